"""The package of a compiled graph, and the process that makes it."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from pyro_kd.capture import background, package
from tests.support.background import doubled, in_background, traced, until
from tests.support.captured import MARKS

pytestmark = MARKS


def test_a_damaged_package_is_removed_and_made_anew(cache, compiler):
    compiler("import time; time.sleep(600)")
    x = torch.ones(3)
    cache.mkdir()
    path = cache / f"{package.key_of(traced(doubled, x), [x])}.pt2"
    path.write_bytes(b"PK\x03\x04 nothing")
    graph = in_background(doubled, x)
    assert not path.exists()
    assert graph(x)[0].shape == (3,)
    assert graph.is_compiling


def test_of_two_processes_one_makes_the_package_and_the_other_waits_for_it(cache):
    """As of the ranks of a machine. What waits would fail if it compiled: its job is no job."""
    cache.mkdir()
    made, job = cache / "key.pt2", cache / "job.pt"
    job.write_bytes(b"nothing")
    with FileLock(made.with_suffix(".lock")):
        waiting = subprocess.Popen(package.command(job, made), stderr=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=15)
        made.touch()
    assert waiting.wait(timeout=60) == 0, waiting.stderr.read()
    waiting.stderr.close()
    assert sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") == ["job.pt", "key.pt2"]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc")
@pytest.mark.parametrize(("seconds", "signal"), [(8, signal.SIGKILL), (8, signal.SIGTERM), (1, signal.SIGKILL)])
def test_the_process_ends_with_a_program_that_is_killed(seconds, signal, cache, tmp_path):
    """And removes the job, which has the weights. It may be killed before it has imported torch."""
    cache.mkdir()
    made, said, job = cache / "key.pt2", cache / "pid", tmp_path / "work" / "job.pt"
    job.parent.mkdir()
    job.touch()
    package.log_of(job).touch()
    start = "import pathlib, subprocess, sys, time; process = subprocess.Popen(sys.argv[2:], start_new_session=True); "
    start += "pathlib.Path(sys.argv[1]).write_text(str(process.pid)); time.sleep(600)"
    with FileLock(made.with_suffix(".lock")):  # so that it waits
        program = subprocess.Popen([sys.executable, "-c", start, str(said), *package.command(job, made)])
        until(lambda: said.exists() and said.read_text())
        pid = int(said.read_text())
        until(lambda: b"pyro_kd" in command_line(pid))
        time.sleep(seconds)  # until it has imported torch
        os.kill(pid, 0)
        program.send_signal(signal)
        program.wait()
        until(lambda: b"pyro_kd" not in command_line(pid), seconds=30)
    assert not job.parent.exists()


def test_the_process_has_a_session_of_its_own(cache, compiler):
    """So that Ctrl-C in a terminal does not end it: training may go on."""
    compiler("import time; time.sleep(600)")
    x = torch.ones(3)
    graph = in_background(doubled, x)
    graph(x)
    assert os.getsid(graph._process.pid) == graph._process.pid != os.getsid(0)


def test_a_job_that_is_gone_leaves_the_graph_as_it_is(cache, compiler):
    compiler("import time; time.sleep(600)")
    x = torch.ones(3)
    graph = in_background(doubled, x)
    graph._clean()
    with pytest.warns(UserWarning, match="not compiled in the background and goes on as it is: FileNotFoundError"):
        assert graph(x)[0].shape == (3,)


def command_line(pid):
    """Of a process that runs; nothing of one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_key_is_that_of_code_inputs_constants_and_threads():
    x, weight = torch.ones(3), torch.ones(3)
    key = package.key_of(traced(doubled, x), [x])
    assert key == package.key_of(traced(doubled, x), [x + 1])
    assert key != package.key_of(traced(lambda x: [x * 3 + torch.rand(3)], x), [x])
    assert key != package.key_of(traced(doubled, x), [x.double()])

    def times(constant):
        return lambda x: [x * constant]

    held = [package.key_of(traced(times(constant), x), [x]) for constant in (weight, weight.clone(), weight + 1)]
    assert held[0] == held[1] != held[2]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert key != package.key_of(traced(doubled, x), [x])
    finally:
        torch.set_num_threads(threads)


def test_one_graph_compiles_at_a_time_and_one_that_is_left_alone_gives_way(cache, compiler):
    compiler("import time; time.sleep(600)")
    x = torch.ones(3)
    first, second = in_background(doubled, x), in_background(lambda x: [x * 3], x)
    for _ in range(2 * background._LEFT_ALONE):  # both are called in turn: the first goes on
        first(x)
        second(x)
    assert first.is_compiling
    assert not second.is_compiling
    for _ in range(background._LEFT_ALONE):
        second(x)
    assert not first.is_compiling
    assert second.is_compiling


def test_the_process_ends_with_its_graph(cache, compiler):
    compiler("import time; time.sleep(600)")
    x = torch.ones(3)
    graph = in_background(doubled, x)
    graph(x)
    process, work = graph._process, graph._job.parent
    started = package.unfinished(graph._package, process.pid)
    started.touch()
    assert process.poll() is None
    assert work.exists()
    del graph
    assert process.poll() is not None
    assert not work.exists()
    assert not started.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_leaves_the_compiler_alone(cache, compiler):
    compiler("import time; time.sleep(600)")
    x = torch.ones(3)
    graph = in_background(doubled, x)
    graph(x)
    background._end(graph._process, graph._package, os.getpid() + 1)
    background._remove(graph._job.parent, os.getpid() + 1)
    assert graph.is_compiling
    assert graph._job.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_does_not_judge_the_compiler_of_its_parent(cache, compiler, monkeypatch):
    """It warns of nothing, and takes the package once it is there."""
    compiler("import time; time.sleep(600)")
    x = torch.ones(3)
    graph = in_background(doubled, x)
    graph(x)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            warnings.simplefilter("error")
            graph(x)
            waits = not graph._is_settled and not graph.is_compiling and not background.is_compiling()
            monkeypatch.setattr(background, "load", lambda path: doubled)
            graph._package.touch()
            graph(x)
            code = 0 if waits and graph._run is doubled else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert graph.is_compiling
