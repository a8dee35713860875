"""Counts with a derivative: the draws of the family itself, and a slope that is exact for polynomials of degree 2."""

import pyro.distributions as dist
import pytest
import torch

from pyro_kd.errors import UnsupportedGradientError
from pyro_kd.noise.implicit import IMPLICIT_FAMILIES, implicit
from pyro_kd.noise.laws import Draw, NoiseLaw
from pyro_kd.noise.samplers import sample_on
from pyro_kd.noise.steps import ends_of
from pyro_kd.noise.tape import NoiseTape

pytestmark = pytest.mark.usefixtures("float64")

FAMILIES = {
    "Bernoulli": (lambda a, b: dist.Bernoulli(a), lambda a, b: a),
    "BetaBinomial": (lambda a, b: dist.BetaBinomial(b, a, 7), lambda a, b: 7 * b / (a + b)),
    "Binomial": (lambda a, b: dist.Binomial(7, a), lambda a, b: 7 * a),
    "GammaPoisson": (lambda a, b: dist.GammaPoisson(b, a), lambda a, b: b / a),
    "Geometric": (lambda a, b: dist.Geometric(a), lambda a, b: 1 / a - 1),
    "NegativeBinomial": (lambda a, b: dist.NegativeBinomial(b, a), lambda a, b: b * a / (1 - a)),
    "Poisson": (lambda a, b: dist.Poisson(b), lambda a, b: b),
    "ZeroInflatedDistribution": (lambda a, b: dist.ZeroInflatedPoisson(b, gate=a), lambda a, b: (1 - a) * b),
}
"""The family and its mean, from a in (0, 1) and b > 0."""

OF_ONE_UNIFORM = ("Bernoulli", "Binomial", "Geometric", "Poisson")


def parameters():
    return torch.tensor(0.3, requires_grad=True), torch.tensor(2.5, requires_grad=True)


def test_every_family_is_tested():
    assert set(IMPLICIT_FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_draws_are_those_of_the_family_and_their_mean_has_its_derivative(name):
    make, mean = FAMILIES[name]
    a, b = parameters()
    shape = torch.Size([50, 400])
    tape = NoiseTape()
    plain = sample_on(tape, make(a, b), shape)
    value = sample_on(NoiseTape(tape.draws), implicit(make(a, b)), shape)
    assert torch.equal(value.detach(), plain)
    for parameter, truth in zip((a, b), torch.autograd.grad(mean(a, b), (a, b), allow_unused=True), strict=True):
        if truth is not None:
            slopes = [torch.autograd.grad(row.mean(), parameter, retain_graph=True)[0] for row in value]
            slopes = torch.stack(slopes)
            assert abs(slopes.mean() - truth) < 5 * slopes.std() / len(slopes) ** 0.5


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("name", OF_ONE_UNIFORM)
def test_the_derivative_is_exact_for_polynomials_up_to_degree_two(name, degree):
    a, b = parameters()
    fn = FAMILIES[name][0](a, b)
    support = torch.arange(2.0 if name == "Bernoulli" else 8.0 if name == "Binomial" else 120.0)
    mass = fn.log_prob(support).exp()
    likely = mass > 1e-12
    support, mass = support[likely], mass[likely]
    ends = ends_of(fn, support)
    noise = Draw(NoiseLaw.UNIFORM, ((ends.low + ends.high) / 2).detach(), "")
    value = sample_on(NoiseTape([noise]), implicit(fn), support.shape)
    assert torch.equal(value.detach(), support)
    parameter = b if name == "Poisson" else a
    (found,) = torch.autograd.grad((mass.detach() * value**degree).sum(), parameter, retain_graph=True)
    (truth,) = torch.autograd.grad((mass * support**degree).sum(), parameter)
    is_exact = degree < 3
    assert torch.isclose(found, truth, rtol=1e-6 if is_exact else 1e-3) == is_exact


def test_wrapped_distributions_keep_their_shapes():
    rate = torch.tensor([1.0, 2.0], requires_grad=True)
    value = implicit(dist.Poisson(rate).to_event(1).expand([3]).mask(torch.tensor([True, False, True])))()
    assert value.shape == (3, 2)
    value.sum().backward()
    assert (rate.grad > 0).all()


@pytest.mark.parametrize(
    "fn", [dist.Poisson(torch.tensor(0.0)), dist.Bernoulli(logits=torch.tensor([-torch.inf, torch.inf]))]
)
def test_draws_at_the_ends_of_the_parameters_are_finite(fn):
    assert implicit(fn)().isfinite().all()


def test_a_family_that_draws_in_its_own_way_has_none():
    class Mine(dist.Poisson):
        def sample(self, sample_shape=()):
            return torch.poisson(self.rate).flip(0)

    message = "Mine has no implicit derivative: Bernoulli, BetaBinomial, Binomial, GammaPoisson, Geometric, NegativeBinomial, Poisson"
    with pytest.raises(UnsupportedGradientError, match=message):
        implicit(Mine(torch.ones(2)))
