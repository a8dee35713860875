"""Parameters of distributions that leave their constraint are found in the first call in which they do, captured or not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_kd import freeze
from pyro_kd.errors import InvalidParameterError
from pyro_kd.training import CompiledELBO
from tests.support.losses import SurrogateKD

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(value):
    return dist.Normal(torch.zeros(3), value).to_event(1)


def mixture(value):
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), value[:2]))


LAWS = {
    "Normal": (normal, "scale"),
    "Laplace": (lambda value: dist.Laplace(torch.zeros(3), value).to_event(1), "scale"),
    "LogNormal": (lambda value: dist.LogNormal(torch.zeros(3), value).to_event(1), "scale"),
    "Gamma": (lambda value: dist.Gamma(value, torch.ones(3)).to_event(1), "concentration"),
    "Exponential": (lambda value: dist.Exponential(value).to_event(1), "rate"),
    "masked": (
        lambda value: dist.Normal(torch.zeros(3), value).mask(torch.tensor([True, True, False])).to_event(1),
        "scale",
    ),
    "Cauchy of a mixture": (mixture, "scale"),
    "cholesky": (lambda value: dist.MultivariateNormal(torch.zeros(3), scale_tril=value.diag()), "scale_tril"),
}


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("make", LAWS.values(), ids=LAWS)
def test_the_first_call_with_a_negative_parameter_raises(make, is_captured):
    make, name = make
    value = nn.Parameter(torch.ones(3))
    module = SurrogateKD(["x"])(lambda: pyro.sample("x", make(value)), freeze(lambda: pyro.sample("x", make(torch.ones(3)))))
    if is_captured:
        module.compile(backend=None)
    for _ in range(3):
        module()
    value.data[0] = -0.5
    with pytest.raises(InvalidParameterError, match=rf"parameter '\w*{name}'.*site 'x'"):
        module()
    value.data[0] = 0.5
    assert module().isfinite()


def test_a_probability_above_one_is_found():
    probs = nn.Parameter(torch.full((3,), 0.5))

    def student():
        z = pyro.sample("z", dist.Bernoulli(probs).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1))

    def teacher():
        z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1))

    module = SurrogateKD(["x"])(student, freeze(teacher))
    module.compile(backend=None)
    module()
    probs.data[1] = 1.5
    with pytest.raises(ValueError, match="probs|z"):
        module()


@pytest.mark.parametrize("grad", [True, False])
def test_a_captured_elbo_equals_the_eager_one(grad):
    scale = nn.Parameter(torch.ones(3))

    def model():
        pyro.sample("z", normal(torch.ones(3)))

    def guide():
        pyro.sample("z", normal(scale))

    elbo = CompiledELBO(Trace_ELBO(), model, guide, backend=None)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            elbo()
        scale.data[0] = -1.0
        with pytest.raises(InvalidParameterError, match="scale.*'z'"):
            elbo()


class Uniforms(nn.Module):
    """The constraint is between two parameters: only torch's own validation sees that it is broken."""

    def __init__(self):
        super().__init__()
        self.high, self.loc = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
        self.norm, self.runs = nn.BatchNorm1d(2), 0

    def forward(self, x):
        self.runs += 1
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Uniform(torch.zeros(2), self.high).to_event(1))
            pyro.sample("x", dist.Normal(self.norm(x) + u + self.loc, 1.0).to_event(1))


def test_every_fiftieth_call_of_a_graph_is_validated_in_full():
    student, x, results = Uniforms(), torch.randn(4, 2), []
    teacher = freeze(Uniforms())
    for is_captured in (True, False):
        student.norm.reset_running_stats()
        module = SurrogateKD(["x"], latent_weight=0.0)(student, teacher)
        if is_captured:
            module.compile(backend=None)
        pyro.set_rng_seed(0)
        results.append(([module(x).item() for _ in range(60)], student.norm.running_mean.clone(), torch.rand(())))
    torch.testing.assert_close(*results)  # the validation has no effect but an error

    captured = SurrogateKD(["x"], latent_weight=0.0)(student, teacher)
    captured.compile(backend=None)
    captured(x)
    student.high.data.fill_(-1.0)
    with pytest.raises(ValueError, match="Uniform"):
        for _ in range(50):
            captured(x)


def test_validation_that_is_off_stays_off():
    student, x = Uniforms(), torch.randn(4, 2)
    captured = SurrogateKD(["x"], latent_weight=0.0)(student, freeze(Uniforms()))
    captured.compile(backend=None)
    with pyro.validation_enabled(False):
        for _ in range(60):
            captured(x)
    assert student.runs == 3
