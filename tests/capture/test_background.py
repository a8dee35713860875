"""Graphs that run as they are until a process of its own has compiled them."""

import itertools
import logging
import os
import subprocess
import tempfile

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.testing import assert_close

from pyro_kd import Distiller, LocalKD, SurrogateKD, freeze
from pyro_kd.capture import background
from pyro_kd.capture.background import BackgroundGraph
from pyro_kd.capture.passes.sequences import shorten
from pyro_kd.training import CompiledELBO
from tests.support.background import doubled, in_background, until
from tests.support.captured import MARKS, Net, outcome, rows

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:.*isn't in the supported list.*")]


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "pyro_kd.capture"]


class Coins(nn.Module):
    """z -> x, with discrete and continuous draws and batch norm."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor([0.2, 0.5])).to_event(1))
            z = pyro.sample("z", dist.Normal(b.sum(-1), 1.0))
            loc = self.net(torch.cat([b, z.unsqueeze(-1)], -1))
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1))


def test_a_loss_is_compiled_in_the_background_and_equals_itself_without_a_graph(cache, caplog):
    """Before, during and after the change: values, gradients, batch norm's averages, and the random stream."""
    caplog.set_level(logging.INFO, "pyro_kd.capture")
    teacher = freeze(Coins(0).eval())
    mine, yours = Coins(1), Coins(1)
    captured, eager = SurrogateKD(["x"])(mine, teacher), SurrogateKD(["x"])(yours, teacher)
    captured.compile(background=True)

    def both(seed):
        one, stream = outcome(captured, 8, seed=seed), torch.rand(1)
        assert_close(one, outcome(eager, 8, seed=seed), rtol=1e-4, atol=1e-5)
        assert_close(stream, torch.rand(1))
        assert_close(dict(mine.named_buffers()), dict(yours.named_buffers()))

    for seed in range(3):
        both(seed)
    assert any("in the background" in message for message in messages(caplog))
    assert not any("compiled after" in message for message in messages(caplog))
    until(lambda: list(cache.glob("*.pt2")) and not list(cache.glob("*.*.pt2")))

    seeds = itertools.count(100)  # equal ones would bring batch norm's averages to rest, where a step too many is not seen

    def is_taken():
        both(next(seeds))
        return any("operations: compiled after" in message for message in messages(caplog))

    until(is_taken)
    for seed in range(3, 6):
        both(seed)

    caplog.clear()  # a second graph of the same programs comes from the cache, in its first call
    captured = SurrogateKD(["x"])(mine, teacher)
    captured.compile(background=True)
    both(7)
    assert any("operations: compiled, from the cache" in message for message in messages(caplog))
    assert not any("in the background" in message for message in messages(caplog))


def test_a_long_graph_runs_shortened_until_it_is_compiled(cache, compiler, monkeypatch, caplog):
    """It is too long for compile(), but not for a process of its own: until that has ended, the loss and its gradients are the same."""
    monkeypatch.setattr("pyro_kd.capture.compile._LONGEST", 1)
    shortened = []
    monkeypatch.setattr("pyro_kd.capture.compile.shorten", lambda module: (shortened.append(module), shorten(module)))
    compiler("import time; time.sleep(600)")
    teacher, mine, yours = freeze(Net(0)), Net(1), Net(1)
    captured, eager = SurrogateKD(["x"])(mine, teacher), SurrogateKD(["x"])(yours, teacher)
    captured.compile(background=True)
    for seed in range(3):
        assert_close(outcome(captured, rows(), seed=seed), outcome(eager, rows(), seed=seed))
    assert background.is_compiling()
    assert len(shortened) == 1
    caplog.set_level(logging.INFO, "pyro_kd.capture")
    captured = SurrogateKD(["x"])(mine, teacher)
    captured.compile()
    outcome(captured, rows(), seed=0)
    assert any("too many for torch.compile, and run as they are; background=True" in message for message in messages(caplog))
    caplog.clear()
    monkeypatch.setattr("pyro_kd.capture.compile._LONGEST_IN_BACKGROUND", 1)
    captured = SurrogateKD(["x"])(mine, teacher)
    captured.compile(background=True)
    outcome(captured, rows(), seed=0)
    assert any(message.endswith("and run as they are") for message in messages(caplog))
    assert len(shortened) == 3
    graph = captured.loss._pairs._pairs[0].captured._capture._cache._entries()[0].graph
    assert not isinstance(graph._run, BackgroundGraph)


def test_a_distiller_trains_while_its_step_compiles(cache, compiler):
    """The same steps as without compiling: nothing waits for the process."""
    compiler("import time; time.sleep(600)")
    teacher = freeze(Net(0))

    def trained(**options):
        torch.manual_seed(0)
        student = Net(1)
        distiller = Distiller(
            student, teacher, lambda params: torch.optim.Adam(params, 0.01), SurrogateKD(["x"]), local_steps=3, **options
        )
        torch.manual_seed(5)
        distiller.fit(rows(), steps=8)
        return student.state_dict()

    assert_close(trained(compile={"background": True}), trained(compile={"backend": None}), rtol=0.0, atol=0.0)


def test_a_package_that_differs_is_not_taken(cache, compiler, monkeypatch):
    compiler("import sys; open(sys.argv[2], 'w').close()")
    monkeypatch.setattr(background, "load", lambda path: lambda x: [x * 2 + 0.5])  # has drawn its numbers once, for good
    x = torch.ones(3)
    graph = in_background(doubled, x)
    with pytest.warns(UserWarning, match="not compiled in the background and goes on as it is: its results differ"):
        until(lambda: graph(x) and graph._is_settled)
    torch.manual_seed(0)
    found = graph(x)[0]
    torch.manual_seed(0)
    assert_close(found, doubled(x)[0])


def test_a_package_that_draws_one_number_more_is_not_taken(cache, compiler, monkeypatch):
    compiler("import sys; open(sys.argv[2], 'w').close()")

    def more(x):
        found = doubled(x)
        torch.rand(1)
        return found

    monkeypatch.setattr(background, "load", lambda path: more)
    x = torch.ones(3)
    graph = in_background(doubled, x)
    with pytest.warns(UserWarning, match="its results differ"):
        until(lambda: graph(x) and graph._is_settled)


def test_one_call_that_rounding_has_turned_over_is_forgiven(cache, compiler, monkeypatch):
    compiler("import sys; open(sys.argv[2], 'w').close()")
    calls = []

    def once(x):
        calls.append(x)
        return [doubled(x)[0] + (len(calls) == 1)]

    monkeypatch.setattr(background, "load", lambda path: once)
    x = torch.ones(3)
    graph = in_background(doubled, x)
    until(lambda: graph(x) and graph._is_settled)
    assert graph._run is once


def test_a_compiler_that_fails_leaves_the_graph_as_it_is(cache, compiler):
    compiler("import sys; print('no C++ compiler', file=sys.stderr); sys.exit(3)")
    x = torch.ones(3)
    graph = in_background(doubled, x)
    with pytest.warns(UserWarning, match="the compiler's process ended with 3: no C\\+\\+ compiler"):
        until(lambda: graph(x) and graph._is_settled)
    assert graph(x)[0].shape == (3,)


def test_a_cache_that_cannot_be_written_leaves_the_graph_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    x = torch.ones(3)
    with pytest.warns(UserWarning, match="not compiled in the background and goes on as it is: (NotADirectory|FileExists)"):
        graph = in_background(doubled, x)
    assert graph(x)[0].shape == (3,)


def test_a_process_that_cannot_start_leaves_the_graph_as_it_is(cache, monkeypatch):
    monkeypatch.setattr(background, "command", lambda job, made: [str(job.with_name("nothing"))])
    x = torch.ones(3)
    graph = in_background(doubled, x)
    with pytest.warns(UserWarning, match="goes on as it is: FileNotFoundError"):
        found = graph(x)
    assert found[0].shape == (3,)


@pytest.mark.parametrize(
    "compiled",
    [
        lambda **options: SurrogateKD(["x"]).compile(**options),
        lambda **options: LocalKD(["x"])(Net(0), freeze(Net(1))).compile(**options),
        lambda **options: CompiledELBO(Trace_ELBO(), Net(0), lambda inputs: None, **options),
        lambda **options: Distiller(
            Net(0), freeze(Net(1)), lambda p: torch.optim.Adam(p, 0.1), SurrogateKD(["x"]), compile=options
        ),
    ],
)
def test_background_takes_no_options_of_torch_compile(compiled):
    with pytest.raises(ValueError, match=r"background=True\) compiles by inductor with its own options, and takes no mode"):
        compiled(background=True, mode="max-autotune", max_graphs=3)


def test_folders_of_killed_processes_are_removed_at_the_next_start(cache, tmp_path, monkeypatch):
    """A process that was killed before its compiler had started left the weights of its graph in the temporary folder for good."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    gone = subprocess.Popen(["true"])
    gone.wait()
    kept = [f"pyro_kd-job-{gone.pid}-new", f"pyro_kd-job-{os.getpid()}-live", "pyro_kd-job-x-odd", f"other-{gone.pid}-old"]
    for name in (f"pyro_kd-job-{gone.pid}-old", *kept):
        (temporary / name).mkdir()
        (temporary / name / "job.pt").touch()
        if name != kept[0]:
            os.utime(temporary / name, (0, 0))
    graph = in_background(doubled, torch.ones(3))
    assert sorted(path.name for path in temporary.iterdir()) == sorted([*kept, graph._job.parent.name])
