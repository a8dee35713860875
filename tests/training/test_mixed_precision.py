"""In mixed precision, networks are rounded, and nothing else is."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_kd import Distiller, LocalKD, errors, freeze
from pyro_kd.losses import run_pair
from pyro_kd.noise.laws import NoiseLaw
from pyro_kd.sites.full_precision import in_float32
from pyro_kd.training import ELBOObjective, Trainer, precision
from tests.support.losses import SurrogateKD
from tests.support.training_programs import adam, fit, quiet_fit

ROWS = 64
BF16 = torch.bfloat16


class Model(nn.Module):
    """Networks under every kind of law: by location, by logits, and by a covariance."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        self.head = nn.Linear(4, 5)
        self.outer = nn.Linear(4, 2)

    def laws(self, rows, values):
        """The laws of the sites, given what was drawn before."""
        yield "z", dist.Normal(torch.zeros(rows, 2), 1.0).to_event(1)
        hidden = self.net(values["z"])
        yield "c", dist.OneHotCategorical(logits=self.head(torch.cat([values["z"], hidden], -1)))
        inner = torch.cat([hidden, values["z"]], -1)
        triangle = torch.eye(2) + 0.1 * torch.ones(2, 2).tril()
        yield "x", dist.MultivariateNormal(self.outer(inner), scale_tril=triangle)

    def forward(self, rows):
        pyro.module("model", self)
        values = {}
        with pyro.plate("rows", rows):
            for name, law in self.laws(rows, values):
                values[name] = pyro.sample(name, law)


def pair():
    pyro.clear_param_store()
    return Model(2), freeze(Model(1))


def autocast(enabled=True):
    return torch.autocast("cpu", BF16, enabled=enabled)


def exact(values, rows=ROWS):
    """The local loss by hand: networks under autocast, and everything else in float64."""
    total = 0.0
    with torch.no_grad(), autocast():
        mine, theirs = [list(Model(seed).laws(rows, values)) for seed in (2, 1)]
    for (name, q), (_, p) in zip(mine, theirs, strict=True):
        if name == "c":
            p, q = [dist.OneHotCategorical(logits=fn.logits.double()) for fn in (p, q)]
        elif name == "x":
            p, q = [dist.MultivariateNormal(fn.loc.double(), scale_tril=fn.scale_tril.double()) for fn in (p, q)]
        else:
            continue
        total += torch.distributions.kl_divergence(p, q).sum().item()
    return total


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "captured"])
def test_the_error_of_bfloat16_is_that_of_the_networks(compile):
    """The loss is the one of the rounded networks, to float32's precision; that of float32 networks is another."""
    student, teacher = pair()
    loss = LocalKD(["x", "c"], latent_weight=1.0)
    module = loss(student, teacher)
    if compile:
        module.compile(backend=None)
    with torch.no_grad():
        plain = module(ROWS)
    found = []
    for _ in range(3):  # the first captured call runs the handlers too
        pyro.set_rng_seed(3)
        with torch.no_grad(), autocast():
            found.append(module(ROWS))
    assert found[0].dtype == plain.dtype == torch.float32
    pyro.set_rng_seed(3)
    with torch.no_grad(), autocast():
        run = run_pair(student, teacher, (ROWS,), targets=["x", "c"], given_sites=lambda sites, targets: list(sites))
        values = {pair.name: pair.value for pair in run.pairs}
    assert all(value.dtype == torch.float32 for value in values.values())
    expected = exact(values)
    for each in found:
        assert each.item() == pytest.approx(expected, rel=2e-6)
    pyro.set_rng_seed(3)
    with torch.no_grad():
        assert module(ROWS).item() != pytest.approx(expected, rel=1e-5)


def test_noise_and_draws_are_float32_in_a_bfloat16_program():
    drawn, sample = [], NoiseLaw.sample

    def noting(law, shape, dtype, device, generator=None):
        drawn.append(dtype)
        return sample(law, shape, dtype, device, generator)

    student, teacher = pair()
    NoiseLaw.sample = noting
    try:
        with autocast():
            SurrogateKD(["x", "c"])(student, teacher)(ROWS).backward()
    finally:
        NoiseLaw.sample = sample
    assert set(drawn) == {torch.float32}
    assert all(param.grad.dtype == torch.float32 and param.grad.any() for param in student.parameters())
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_is_as_it_was_after_an_error_in_a_site():
    def student(rows):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(0.0, -pyro.param("s", torch.tensor(1.0))))

    with autocast():
        with pytest.raises(ValueError):
            SurrogateKD(["x"]).loss(student, student, 3)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == BF16
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda x: dist.Normal(x, x.exp()).to_event(1),
        lambda x: dist.Categorical(logits=x),
        lambda x: dist.OneHotCategorical(probs=x.float().softmax(-1).to(x.dtype), validate_args=False),
        lambda x: dist.MixtureSameFamily(dist.Categorical(logits=x), dist.Normal(x, 1.0)),
        lambda x: dist.TransformedDistribution(dist.Normal(x, 1.0), [dist.transforms.AffineTransform(x, 2.0)]),
        lambda x: dist.Normal(x, 1.0).mask(x > 0),
        lambda x: dist.LogNormal(x, 1.0).expand([3, *x.shape]),
        lambda x: dist.Delta(x).to_event(1),
    ],
)
def test_a_distribution_is_the_one_of_its_rounded_parameters(make):
    x = torch.linspace(-2, 1, 7).to(BF16)
    found, expected = in_float32(make(x)), make(x.float())
    value = expected.sample()
    assert type(found) is type(expected)
    torch.testing.assert_close(found.log_prob(value), expected.log_prob(value), rtol=0.02, atol=0.02)
    assert found.log_prob(value).dtype == torch.float32
    assert found.sample().dtype == expected.sample().dtype
    if hasattr(found, "probs"):
        assert found.probs.sum(-1) == pytest.approx(1, abs=1e-6)
    assert in_float32(expected) is expected


def trained(compile=False, **options):
    student, teacher = pair()
    distiller = Distiller(student, teacher, adam, SurrogateKD(["x", "c"]), compile=compile, **options)
    quiet_fit(distiller, 8, steps=4, seed=1)
    return distiller


def test_a_distiller_trains_networks_in_bfloat16_and_keeps_float32_parameters():
    mixed, plain = trained(precision="bf16-mixed"), trained()
    assert all(param.dtype == torch.float32 for param in mixed.parameters.values())
    assert mixed.history.losses != plain.history.losses
    assert mixed.history.losses[0] == pytest.approx(plain.history.losses[0], rel=0.02)
    assert trained(precision="32-true").history.losses == plain.history.losses
    captured = trained(compile={"backend": None}, precision="bf16-mixed")
    assert captured.history.losses == pytest.approx(mixed.history.losses, rel=2**-8)  # bfloat16's


def test_an_elbo_is_computed_in_float32_from_rounded_networks():
    student, _ = pair()

    def guide(rows):
        pass

    def model(rows):
        with pyro.plate("rows", rows):
            student_loc = student.net(torch.linspace(-1, 1, 2 * rows).reshape(rows, 2))
            fn = dist.MultivariateNormal(student_loc, torch.eye(2))
            seen.append(fn)
            pyro.sample("x", fn, obs=torch.ones(rows, 2) / 3)

    seen = []
    for compile in (False, {"backend": None}):
        objective = ELBOObjective(Trace_ELBO(), model, guide)
        trainer = Trainer(objective, lambda params: torch.optim.SGD(params, lr=0.0), precision="bf16-mixed", compile=compile)
        quiet_fit(trainer, 8, steps=2)
        with torch.no_grad(), autocast():
            model(8)
        law = dist.MultivariateNormal(seen[-1].loc.double(), torch.eye(2).double())
        assert seen[-1].loc.dtype == BF16
        expected = -law.log_prob(torch.ones(8, 2).double() / 3).sum().item()
        assert trainer.history.losses == pytest.approx([expected] * 2, rel=1e-6)
        assert trainer.evaluate(8).loss.mean == pytest.approx(expected, rel=1e-6)


def test_a_run_resumes_in_its_precision_only(tmp_path):
    options = {"precision": "bf16-mixed"}
    whole = fit(tmp_path / "one", 8, options=options)
    fit(tmp_path / "two", 4, options=options)
    assert fit(tmp_path / "two", 8, resume=True, options=options).history.losses == whole.history.losses
    with pytest.raises(errors.RunMismatchError, match="precision: was 'bf16-mixed', is not there"):
        fit(tmp_path / "two", 12, resume=True)


def test_an_unknown_precision_is_an_error():
    expected = "precision must be one of '32-true', 'bf16-mixed', '16-mixed', not 'bf16'"
    with pytest.raises(ValueError, match=re.escape(expected)):
        trained(precision="bf16")


def test_float16_needs_a_gpu():
    with pytest.raises(errors.MissingDeviceError, match="'16-mixed' is for CUDA devices, and parameter .* is on 'cpu'"):
        trained(precision="16-mixed")


def test_float16_scales_its_losses_and_skips_steps_that_overflow(monkeypatch, tmp_path):
    """On a CPU, where torch can scale losses too."""
    monkeypatch.setattr(precision, "_DEVICES_OF_FLOAT16", ("cpu",))
    plain = trained()
    distiller = trained(precision="16-mixed")
    scaler = distiller._stepper.precision.scaler
    assert distiller.history.losses[0] == pytest.approx(plain.history.losses[0], rel=0.01)
    before = {name: param.clone() for name, param in distiller.parameters.items()}
    scaler.load_state_dict(scaler.state_dict() | {"scale": 3e38})
    quiet_fit(distiller, 8, steps=1)
    assert scaler.get_scale() == pytest.approx(1.5e38)
    assert all(torch.equal(before[name], param) for name, param in distiller.parameters.items())
    quiet_fit(distiller, 8, steps=1, checkpoints=tmp_path)
    again = trained(precision="16-mixed")
    quiet_fit(again, 8, steps=2, checkpoints=tmp_path, resume=True)
    assert again._stepper.precision.scaler.get_scale() == scaler.get_scale() / 2  # that of the checkpoint, after one more
