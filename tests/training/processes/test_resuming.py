"""Runs of several processes that were interrupted or killed end as if nothing had happened."""

import random
import time

import pytest
from safetensors.torch import load_file

from tests.support.changing_processes import shifted
from tests.support.processes import Failure, in_processes, start
from tests.support.shared_training import batches_taken, life, reusing
from tests.support.training_programs import header_of, names

pytestmark = pytest.mark.filterwarnings("ignore:the student draws these outside")  # dropout in train mode


def results(found):
    assert not any(each is None or isinstance(each, Failure) for each in found), found
    return [each[0] for each in found]


def test_an_interrupted_run_is_bit_for_bit_the_undisturbed_one(tmp_path):
    """The first process hears of Ctrl-C after step 10, tells the others in the next step, and all stop after it."""
    undisturbed = results(in_processes(life, tmp_path / "one", 24))
    first, second = in_processes(life, tmp_path / "two", 24, 10)
    assert first[2] == second[2] == 11
    assert any("stopped by Ctrl-C after step 11 of 24" in text for text in second[1])
    assert results(in_processes(life, tmp_path / "two", 24)) == undisturbed
    assert undisturbed[0] != undisturbed[1]  # their random streams differ
    assert names(tmp_path / "two") == ["step-00000020", "step-00000024"]
    assert not [name for name in load_file(tmp_path / "two/step-00000024/student.safetensors") if "teacher" in name]


def test_whole_numbers_in_buffers_go_on_as_in_the_undisturbed_run(tmp_path):
    """Each process goes on from the first one's count, also where the run was not interrupted."""
    undisturbed = in_processes(shifted, tmp_path / "one", 6)
    in_processes(shifted, tmp_path / "two", 4)
    assert in_processes(shifted, tmp_path / "two", 6) == undisturbed
    assert all(isinstance(count, int) for count, _ in undisturbed)
    assert undisturbed[0][1] == undisturbed[1][1]


def test_each_process_has_draws_of_its_own_that_serve_several_steps(tmp_path):
    """They differ, are made anew from the checkpoint, and the students stay equal."""
    undisturbed = in_processes(reusing, 11)
    assert undisturbed[0][0] != undisturbed[1][0]
    assert undisturbed[0][1] == undisturbed[1][1]
    in_processes(reusing, 7, tmp_path)
    assert in_processes(reusing, 11, tmp_path) == undisturbed


def test_each_process_goes_on_in_its_own_epoch(tmp_path):
    """The first process stops after two batches of an epoch, the second after none of its own."""
    assert in_processes(batches_taken, "parts", tmp_path, 5) == [[0, 1, 2, 0, 1], [10, 11, 12, 13, 14]]
    assert in_processes(batches_taken, "parts", tmp_path, 9) == [[2, 0, 1, 2], [10, 11, 12, 13]]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("reuse", [None, 3])
def test_killed_runs_lose_nothing(tmp_path, reuse):
    """One or both of the processes are killed, at random moments."""
    begin = time.perf_counter()
    undisturbed = results(in_processes(life, tmp_path / "one", 60, None, reuse))
    length, chance = time.perf_counter() - begin, random.Random(0)
    for kills in range(4):
        processes, _ = start(life, tmp_path / "two", 60, None, reuse)
        time.sleep(chance.uniform(0.3, 0.8) * length)
        for process in processes if kills % 2 else [processes[chance.randrange(2)]]:
            process.kill()
        for process in processes:
            process.join(60)
            assert not process.is_alive()
    assert results(in_processes(life, tmp_path / "two", 60, None, reuse)) == undisturbed


def test_a_killed_process_goes_on_with_its_draws(tmp_path):
    """One process is killed in the middle of a run in which draws serve three steps: the resumed run is the undisturbed one."""
    undisturbed = results(in_processes(life, tmp_path / "one", 24, None, 3))
    processes, _ = start(life, tmp_path / "two", 24, None, 3)
    end = time.monotonic() + 60
    while not (tmp_path / "two" / "step-00000012").exists() and time.monotonic() < end:
        time.sleep(0.005)
    processes[1].kill()
    for process in processes:
        process.join(60)
        assert not process.is_alive()
    assert results(in_processes(life, tmp_path / "two", 24, None, 3)) == undisturbed


@pytest.mark.parametrize(("before", "after", "reuse"), [(2, 1, None), (1, 2, None), (2, 1, 3)])
def test_a_different_number_of_processes_resumes_and_says_what_is_not_the_same(tmp_path, before, after, reuse):
    assert all(each[2] == 20 for each in in_processes(life, tmp_path, 20, None, reuse, size=before))
    values = header_of(tmp_path / "step-00000020")["values"]
    assert values.get("processes", 1) == before
    found = in_processes(life, tmp_path, 30, None, reuse, size=after)
    assert all(each[2] == 30 for each in found)
    counts = {1: "1 process", 2: "2 processes"}
    expected = f"step-00000020 was written by {counts[before]}, and {counts[after]} resumed from it. Parameters"
    assert [any(expected in text for text in each[1]) for each in found] == [True] + [False] * (after - 1)
    assert len({each[0] for each in found}) == after  # each has a random stream of its own


@pytest.mark.parametrize("kind", ["generator", "epoch"])
def test_a_different_number_of_processes_begins_the_current_epoch_again(tmp_path, kind):
    """One process is in its second epoch; two take that again, in its order, and then one more."""
    ((*_, one, other, third),) = in_processes(batches_taken, kind, tmp_path, 11, size=1)
    first, second = in_processes(batches_taken, kind, tmp_path, 19)
    again = [batch for pair in zip(first, second, strict=True) for batch in pair]
    assert again[:3] == [one, other, third]
    assert sorted(again[:8]) == sorted(again[8:]) == list(range(8))
    assert again[:8] != again[8:]
