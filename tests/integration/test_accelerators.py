"""What a user does with a GPU, from the objectives to the exported student. The same tests run on the CPU, to be known to be right."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_kd import (
    Distiller,
    DrawsKD,
    LocalKD,
    MarginalKD,
    MultiSampleKD,
    OnPolicyKD,
    TeacherCache,
    bound_report,
    cache_teacher,
    check,
    freeze,
    site_report,
    to_inference_data,
)
from pyro_kd.export import export_sampler, load, load_onnx
from tests.support.losses import SurrogateKD

ROWS, SHIFT = 64, 0.5
EXACT = ROWS * (SHIFT**2 / 2)
"""KL of the targets given the latents, which are the same in both programs: whatever the noise."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


class Program(nn.Module):
    """Latents of three kinds, and a target that is shifted in one of the two programs."""

    def __init__(self, shift, device):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(2, 1)
        self.shift = nn.Parameter(torch.tensor(shift))
        self.to(device)

    def forward(self, rows):
        zero = torch.zeros((), device=self.shift.device)
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(zero.expand(2), 1.0).to_event(1))
            bit = pyro.sample("bit", dist.Bernoulli(logits=self.net(z).squeeze(-1)))
            count = pyro.sample("count", dist.Binomial(10, logits=z[..., 0]))
            pyro.sample("x", dist.Normal(self.net(z).squeeze(-1) + bit - 0.1 * count + self.shift, 1.0))


class Coins(nn.Module):
    """One latent coin, and a target coin."""

    def __init__(self, logit, device):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit, device=device))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(logits=self.logit))
            pyro.sample("y", dist.Bernoulli(logits=2 * z - self.logit))

    def law(self):
        """The probability that y is 1."""
        p = self.logit.sigmoid()
        return p * (2 - self.logit).sigmoid() + (1 - p) * (-self.logit).sigmoid()


def programs(device):
    pyro.clear_param_store()
    return Program(SHIFT, device), freeze(Program(0.0, device))


def sgd(params):
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9)


@pytest.mark.parametrize("options", [None, {"backend": None}], ids=["eager", "captured"])
@pytest.mark.parametrize(
    "make",
    [SurrogateKD, LocalKD, lambda targets: SurrogateKD(targets, teacher_forcing=0.5)],
    ids=["surrogate", "local", "forced"],
)
def test_a_loss_is_exact_and_has_its_gradient(device, make, options):
    student, teacher = programs(device)
    loss = make(["x"])(student, teacher)
    if options is not None:
        loss.compile(**options)
    for _ in range(3):
        student.zero_grad()
        value = loss(ROWS)
        value.backward()
        assert value.device.type == device
        assert value.item() == pytest.approx(EXACT, rel=1e-4)
        assert student.shift.grad.item() == pytest.approx(ROWS * SHIFT, rel=1e-4)


@pytest.mark.parametrize("gradient", ["cut", "implicit", "boundary", "score"])
def test_gradients_through_discrete_latents(device, gradient):
    student, teacher = programs(device)
    sites = ("bit", "count") if gradient != "boundary" else ("bit",)
    loss = SurrogateKD(["x"], discrete_gradient=dict.fromkeys(sites, gradient))
    value = loss(student, teacher)(ROWS)
    value.backward()
    assert value.item() == pytest.approx(EXACT, rel=1e-4)
    assert all(param.grad.isfinite().all() and param.grad.device.type == device for param in student.parameters())


@pytest.mark.parametrize(
    "make",
    [lambda: MultiSampleKD(["x"], num_samples=4), lambda: DrawsKD(["x"]), lambda: OnPolicyKD(["x"])],
    ids=["samples", "draws", "on policy"],
)
def test_other_objectives_have_gradients(device, make):
    student, teacher = programs(device)
    value = make()(student, teacher)(ROWS)
    value.backward()
    assert value.isfinite()
    assert value.device.type == device
    assert student.shift.grad.isfinite()
    assert student.shift.grad != 0


@pytest.mark.parametrize("options", [None, {"backend": None}], ids=["eager", "captured"])
def test_the_exact_marginal(device, options):
    student, teacher = Coins(1.0, device), freeze(Coins(0.0, device))
    loss = MarginalKD(["y"], enumerate_targets=True)(student, teacher)
    if options is not None:
        loss.compile(**options)
    q, p = student.law().item(), Coins(0.0, "cpu").law().item()
    exact = p * torch.tensor(p / q).log() + (1 - p) * torch.tensor((1 - p) / (1 - q)).log()
    value = loss(ROWS)
    value.backward()
    assert value.item() == pytest.approx(ROWS * exact.item(), rel=1e-4)
    assert student.logit.grad.isfinite()


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"reuse": 2}, {"compile": {"backend": None}}], ids=str)
def test_distiller_resumes_bit_for_bit(device, options, tmp_path):
    """Eight steps at once, and four and four."""

    def run(steps, folder):
        student, teacher = programs(device)
        distiller = Distiller(student, teacher, sgd, SurrogateKD(["x"]), device=device, **options)
        distiller.fit(ROWS, steps=steps, seed=0, checkpoints=folder, resume=True, progress=False)
        return student

    whole = run(8, tmp_path / "whole")
    run(4, tmp_path / "parts")
    resumed = run(8, tmp_path / "parts")
    assert whole.shift.item() < SHIFT
    assert whole.shift.device.type == device
    for (name, expected), actual in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, actual), name


def test_a_cache_serves_another_device(device, tmp_path):
    """Draws of a teacher on this device train a student on it; they are written for any."""
    student, teacher = programs(device)
    cache_teacher(teacher, ROWS, path=tmp_path / "draws", batches=4, targets=["x"], seed=0)
    cache = TeacherCache(tmp_path / "draws")
    distiller = Distiller(student, cache.teacher, sgd, SurrogateKD(["x"]), device=device)
    distiller.fit(batches=cache.loader(seed=0), steps=8, seed=0, progress=False)
    assert 0 < student.shift.item() < SHIFT
    assert student.shift.device.type == device


def test_reports(device):
    student, teacher = programs(device)
    loss = SurrogateKD(["x"])
    assert not check(loss, student, teacher, ROWS).errors
    assert "count" in str(site_report(loss, student, teacher, ROWS, num_samples=2))
    assert loss.loss(student, teacher, ROWS) == pytest.approx(EXACT, rel=1e-4)
    report = bound_report(student, teacher, ["x"], ROWS, num_samples=2, classifier_rows=500, sample_numbers=(4,), seed=0)
    assert "surrogate" in str(report)
    assert "prior" in to_inference_data(loss, student, teacher, ROWS, num_samples=3).student.groups()


def test_the_student_is_exported(device, tmp_path):
    """From where it was trained to the CPU, through a file."""
    student, _ = programs(device)
    sampler = export_sampler(student, ROWS, targets=["x"])
    assert sampler.device.type == device
    first = sampler.sample(ROWS, seed=0)["x"]
    assert first.device.type == device
    sampler.to("cpu").save(tmp_path / "student.pt2")
    loaded = load(tmp_path / "student.pt2")
    assert loaded.device.type == "cpu"
    assert_close(loaded.sample(ROWS, seed=0)["x"], first.cpu(), rtol=1e-5, atol=1e-5)


def test_onnx_files_are_written_from_where_the_student_is(device, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    student, _ = programs(device)
    sampler = export_sampler(student, ROWS, targets=["x"])
    sampler.save(tmp_path / "student.onnx")
    values = load_onnx(tmp_path / "student.onnx").sample(ROWS, seed=0)["x"]
    assert_close(torch.as_tensor(values), sampler.sample(ROWS, seed=0)["x"].cpu(), rtol=1e-5, atol=1e-5)
