"""Where processes differ, or one of them fails, all of them end with an error that says so, and none waits for the others."""

import pytest

from tests.support.failing_processes import (
    differing,
    divided,
    dying,
    failing,
    late_parameter,
    several_objectives,
    sparse,
    unreached,
)
from tests.support.processes import in_processes
from tests.support.shared_training import reusing


def texts_of(found, name, kind):
    """The texts of an error of a kind in both processes."""
    assert [each[name].kind for each in found] == [kind, kind]
    return [each[name].text for each in found]


def test_processes_that_differ_do_not_train():
    found = in_processes(differing)
    expected = {
        "teacher": "objective 'distillation': the teacher's 'mean': float32 of shape (), #",
        "batches": "batches: 4 in process 0, 5 in process 1",
        "steps": "steps at the end: 3 in process 0, 4 in process 1",
        "option": "accumulate: 1 in process 0, 2 in process 1",
        "stored": "objective 'distillation': the teacher's 'theirs': float32 of shape (), #",
        "parameter": "parameter 'rows.bias': not there in process 0, float32 of shape (3,) in process 1",
        "step": "the teacher's 'mean'",
        "buffer": "buffer 'module 0 (Rows).seen': int64 of shape (4,) in process 0, int64 of shape (6,) in process 1",
    }
    for name, text in expected.items():
        one, other = texts_of(found, name, "ProcessMismatchError")
        assert one == other
        assert text in one
        remedy = "Run the same script in all of them, and make the teacher from the same seed"
        assert f"No step is taken with them. {'Give each buffer the same form' if name == 'buffer' else remedy}" in one
    assert found[0]["after"] == found[1]["after"]


def test_where_one_process_fails_all_stop(tmp_path):
    found = in_processes(failing, str(tmp_path))
    assert [each["loss"][1] for each in found] == [2, 2]
    losses = [each["loss"][0] for each in found]
    assert [loss.kind for loss in losses] == ["NonFiniteLossError", "NonFiniteLossError"]
    assert all("step 3: the kl term of latent site 'z' is NaN" in loss.text for loss in losses)
    assert "(process 1 of 2)" in losses[0].text
    assert all("batches ran out at step 4" in text for text in texts_of(found, "exhausted", "BatchesExhaustedError"))
    assert found[0]["callback"] == ("KeyError", "'the callback fails'")
    assert found[1]["callback"].kind == "ProcessGroupError"
    assert "a different process has failed: KeyError: 'the callback fails' (process 0 of 2)" in found[1]["callback"].text
    assert found[1]["validation"] == ("ZeroDivisionError", "the validation fails")
    assert "ZeroDivisionError: the validation fails (process 1 of 2)" in found[0]["validation"].text
    assert [each["mean"] for each in found] == [[1.5, 1.5], [1.5, 1.5]]
    assert all("cannot be written" in text for text in texts_of(found, "folder", "CheckpointError"))
    assert all("could not be written" in text for text in texts_of(found, "disk", "CheckpointError"))
    assert found[0]["after"] == found[1]["after"]


def test_a_process_that_is_killed_ends_the_others():
    (found, seconds), killed = in_processes(dying, False)
    assert killed is None
    assert found.kind == "ProcessGroupError"
    assert "process 0 of 2 lost the others while adding up gradients" in found.text
    assert "start again with fit(..., checkpoints=..., resume=True)" in found.text
    assert seconds < 20


def test_a_process_that_hangs_is_not_waited_for_longer_than_the_timeout():
    (found, seconds), _ = in_processes(dying, True)
    assert found.kind == "ProcessGroupError"
    assert "is busy for longer than the group's timeout" in found.text
    assert seconds < 20


def test_a_parameter_that_a_process_does_not_reach_counts_with_a_gradient_of_0():
    first, second = in_processes(unreached)
    assert first == second == {"a": -2.0, "b": -2.0, "c": None}  # -4 in one process, 0 in the other


def test_a_parameter_that_one_process_makes_late_is_an_error():
    for found in in_processes(late_parameter):
        assert found.kind == "ProcessMismatchError"
        assert "process 1 of 2 has made the parameter 'late' in a step" in found.text
        assert "Make every parameter in every process before training" in found.text


def test_a_student_of_fsdp2_is_for_a_loop_of_the_users():
    (refused, first), (_, second) = in_processes(divided)
    assert refused.kind == "ProcessGroupError"
    assert "'FSDPWide' of the student is divided among processes, as fully_shard of FSDP2 does it" in refused.text
    assert first == second
    assert isinstance(first, list)


def test_sparse_gradients_are_refused():
    for found in in_processes(sparse):
        assert found.kind == "ProcessGroupError"
        assert "parameter 'sparse.table.weight' has a sparse gradient" in found.text


def test_losses_and_terms_are_means_over_processes():
    first, second = in_processes(several_objectives)
    assert repr(first) == repr(second)
    assert first["loss"][0] == pytest.approx(3.0)  # 4 / 2 in one process, 8 / 2 in the other
    assert first["loss/distillation"][0] == first["term/distillation/y"][0] == pytest.approx(3.0)
    assert first["loss"][1] == pytest.approx(first["loss/distillation"][1] + first["loss/late"][1])


def test_an_argument_that_a_checkpoint_cannot_hold_ends_all_processes(tmp_path):
    """That of the second process alone, so that only it finds out."""
    found = in_processes(reusing, 4, tmp_path, True)
    assert [each.kind for each in found] == ["CheckpointError"] * 2
    assert all("with reuse a checkpoint holds the arguments" in each.text for each in found)
