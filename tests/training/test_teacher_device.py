"""Training with a teacher on a device of its own."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import Distiller, MarginalKD, MultiSampleKD, OnPolicyKD, SurrogateKD, TeacherCache, cache_teacher, check, freeze
from pyro_kd.errors import InvalidProgramError, MissingDeviceError
from pyro_kd.losses import draw_source
from pyro_kd.losses.reuse import drawn_once
from pyro_kd.teachers import on_device
from tests.support.package_files import ROOT
from tests.support.second_device import SECOND, two_devices


@pytest.fixture
def devices():
    with two_devices() as found:
        yield found


class Decoder(nn.Module):
    def __init__(self, seed, width):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x, torch.ones_like(x)).to_event(1))
            bit = pyro.sample("bit", dist.Bernoulli(logits=self.net(z)[..., 0]))
            pyro.sample("y", dist.Normal(self.net(z)[..., 1] + bit, 0.5))


LOSSES = {
    "default": lambda: SurrogateKD(["y"]),
    "reuse": lambda: SurrogateKD(["y"], reuse=2),
    "samples": lambda: MultiSampleKD(["y"], num_samples=3),
}


def trained(loss, *, steps=8, device="cpu", teacher_device=None, batches=None, teacher=None, **options):
    """The student's parameters after a fit, and the losses of its steps."""
    pyro.clear_param_store()
    student = Decoder(1, 3)
    compile = options.pop("compile", False)
    teacher = freeze(Decoder(0, 6)) if teacher is None else teacher
    distiller = Distiller(
        student,
        teacher,
        lambda params: torch.optim.Adam(params, lr=0.05),
        loss,
        device=device,
        teacher_device=teacher_device,
        compile=compile,
        log_every=3,
    )
    batches = list(torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0))) if batches is None else batches
    history = distiller.fit(batches=batches, steps=steps, seed=0, progress=False, **options)
    found = distiller.evaluate(batches=batches)
    return [param.detach().cpu() for param in student.parameters()], [*history["loss"], found.loss]


def assert_equal(one, other):
    assert one[1] == other[1]
    assert all(map(torch.equal, one[0], other[0]))


@pytest.mark.parametrize("device", ["cpu", None])
@pytest.mark.parametrize("name", LOSSES)
def test_a_student_learns_what_it_learns_on_one_device(name, device, devices):
    """Bit for bit. Steps that log their terms and evaluations are among it."""
    teacher = freeze(Decoder(0, 6))
    found = trained(LOSSES[name](), device=device, teacher_device=SECOND, teacher=teacher)
    assert {tensor.device for tensor in teacher.tensors()} == {SECOND}
    assert_equal(found, trained(LOSSES[name]()))


def gradient(loss, student, teacher, *call):
    value = loss.differentiable_loss(student, teacher, *call)
    return [value.detach(), *torch.autograd.grad(value, list(student.parameters()))]


@pytest.mark.parametrize("name", ["default", "samples"])
def test_a_graph_has_the_student_alone(name, monkeypatch):
    """The teacher runs before it: a compiled loss is the eager one on a draw of the teacher, and each call has its own."""
    draws = []
    monkeypatch.setattr(draw_source, "drawn_once", lambda *args: draws.append(drawn_once(*args)) or draws[-1])
    student, teacher = Decoder(1, 3), on_device(Decoder(0, 6), "cpu")
    loss, eager = LOSSES[name]().compile(backend=None), LOSSES[name]()
    for _ in range(4):
        found = gradient(loss, student, teacher, torch.randn(5, 2))
        torch.testing.assert_close(found, gradient(eager, student, teacher, draws[-1]))
    assert len({float(draw.unpacked[2][0].nodes[-1].value.sum()) for draw in draws}) == len(draws) == 4
    assert loss.pair_of(student, teacher).captured._capture.num_graphs == 1


def test_a_compiled_fit_runs_the_teacher_once_a_step(monkeypatch):
    draws = []
    monkeypatch.setattr(draw_source, "drawn_once", lambda *args: draws.append(drawn_once(*args)) or draws[-1])
    trained(SurrogateKD(["y"]), teacher_device="cpu", steps=12, compile={"backend": None})
    assert len(draws) == 11  # the first step runs the programs themselves


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OnPolicyKD(["y"]), "OnPolicyKD continues without a graph: the teacher runs on histories"),
        (lambda: MarginalKD(["y"]), "MarginalKD continues without a graph: it runs the teacher on all states"),
        (
            lambda: SurrogateKD(["y"], discrete_gradient="boundary", teacher_forcing=0.0),
            "SurrogateKD continues without a graph: discrete_gradient='boundary' runs the teacher on changed noise",
        ),
    ],
)
def test_a_loss_that_needs_both_programs_at_once_says_that_it_has_no_graph(make, reason):
    def program(loc):
        def model(rows):
            with pyro.plate("rows", rows):
                bit = pyro.sample("bit", dist.Bernoulli(logits=loc().expand(rows)))
                pyro.sample("y", dist.Normal(bit, 1.0))

        return model

    student = program(lambda: pyro.param("loc", torch.tensor(0.0)))
    loss = make().compile(backend=None)
    with pytest.warns(UserWarning, match=reason + ".*, and the teacher is on a device of its own"):
        first = loss.loss_and_grads(student, on_device(program(lambda: torch.tensor(1.0)), "cpu"), 4)
    assert math.isfinite(first)


def test_the_check_says_what_is_captured():
    student, teacher, x = Decoder(1, 3), on_device(Decoder(0, 6), "cpu"), torch.randn(5, 2)
    assert check(SurrogateKD(["y"]), student, teacher, x).is_captured
    report = check(OnPolicyKD(["y"]), student, teacher, x)
    assert not report.is_captured
    assert "the teacher is on a device of its own, which a graph does not reach" in str(report)


def test_a_checkpoint_is_resumed_with_the_teacher_on_a_different_device(tmp_path, devices):
    options = {"steps": 8, "checkpoints": tmp_path}
    trained(SurrogateKD(["y"], teacher_forcing=0.0), **(options | {"steps": 4}), teacher_device=SECOND)
    found = trained(SurrogateKD(["y"], teacher_forcing=0.0), **options, resume=True)
    assert_equal(found, trained(SurrogateKD(["y"], teacher_forcing=0.0)))


def test_errors(tmp_path):
    teacher = freeze(Decoder(0, 6))
    with pytest.raises(MissingDeviceError, match="teacher_device='cuda:99' is not there"):
        trained(SurrogateKD(["y"]), teacher_device="cuda:99")
    cache_teacher(teacher, torch.zeros(3, 2), path=tmp_path / "draws", batches=1, targets=["y"])
    with pytest.raises(InvalidProgramError, match="teacher_device is for a teacher in memory, and that of a cache is not"):
        trained(SurrogateKD(["y"]), teacher=TeacherCache(tmp_path / "draws").teacher, teacher_device="cpu")
    with two_devices(), pytest.raises(InvalidProgramError, match="on a device of its own already, cpu"):
        trained(SurrogateKD(["y"]), teacher=on_device(teacher, "cpu"), teacher_device=SECOND)


def test_the_lines_of_the_page_train():
    page = (ROOT / "docs/several_processes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(import pyro.*?)```", page.partition("## Devices")[2], re.DOTALL)
    found = {}
    exec(block, found)
    losses = found["history"]["loss"]
    assert len(losses) == 100
    assert losses[-1] < losses[0]


def test_a_bound_loss_does_not_move_it(devices):
    teacher = freeze(Decoder(0, 6))
    SurrogateKD(["y"])(Decoder(1, 3), on_device(teacher, SECOND)).to("cpu")
    assert {tensor.device for tensor in teacher.tensors()} == {SECOND}


EAGER, GRAPH = False, {"backend": None}
ON_GPU = [(name, compile) for name in LOSSES for compile in (EAGER, GRAPH)]
ON_GPU += [("default", True), ("default", {"mode": "reduce-overhead"})]


def numbers(found):
    """Losses and an estimate as numbers, to compare them up to rounding."""
    return [float(getattr(value, "mean", value)) for value in found]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # which inductor recommends
@pytest.mark.parametrize(("name", "compile"), ON_GPU)
def test_a_student_on_a_gpu_learns_from_a_teacher_on_the_cpu(name, compile):
    """What it learns from the teacher on the GPU, up to the rounding of the teacher's network: the noise is the same."""
    batches = list(torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0)))
    teacher = freeze(Decoder(0, 6))
    options = {"batches": batches, "device": "cuda", "compile": compile}
    _, found = trained(LOSSES[name](), teacher=teacher, teacher_device="cpu", **options)
    assert {tensor.device.type for tensor in teacher.tensors()} == {"cpu"}
    _, expected = trained(LOSSES[name](), teacher_device=None if compile is EAGER else "cuda", **options)
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-3)


@pytest.mark.gpu
def test_a_student_on_the_cpu_learns_from_a_teacher_on_a_gpu():
    teacher = freeze(Decoder(0, 6))
    _, found = trained(SurrogateKD(["y"]), teacher=teacher, teacher_device="cuda")
    assert {tensor.device.type for tensor in teacher.tensors()} == {"cuda"}
    assert numbers(found) == pytest.approx(numbers(trained(SurrogateKD(["y"]))[1]), rel=1e-3)


@pytest.mark.gpu
def test_a_draw_is_moved_to_the_gpu_before_the_student_sees_it():
    student, x = Decoder(1, 3).cuda(), torch.randn(5, 2, device="cuda")
    (particle,) = SurrogateKD(["y"]).particles(student, on_device(Decoder(0, 6), "cpu"), x)
    for pair in particle.run.pairs:
        assert {pair.value.device.type, pair.student_value.device.type} == {"cuda"}
    assert {draw.noise.device.type for draws in particle.run.noise.values() for draw in draws} == {"cuda"}
