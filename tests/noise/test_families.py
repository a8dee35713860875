"""Shared noise for every family: bit-for-bit replay, the right law, the right derivative, or an error."""

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_kd import record_noise, replay_noise
from pyro_kd.errors import UnsupportedNoiseError
from pyro_kd.noise.samplers import has_derivative
from tests.support.families import FAMILIES, GAMMA_ACCURACY, WITHOUT_SAMPLER

by_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
SUITE_FAILURE_RATE = 2e-5


def sample(fn):
    return pyro.sample("x", fn)


@by_family
def test_replay_on_the_same_parameters_is_bit_for_bit(family):
    with record_noise() as noise:
        first = sample(family())
    with replay_noise(noise=noise):
        again = sample(family())
    with replay_noise(noise=noise):
        third = sample(family())
    assert first.dtype == again.dtype
    assert torch.equal(first, again)
    assert torch.equal(first, third)
    assert first.shape == family().shape()


@by_family
def test_replay_leaves_the_random_stream_alone(family):
    with record_noise() as noise:
        sample(family())
    before = torch.get_rng_state()
    with replay_noise(noise=noise):
        sample(family())
    assert torch.equal(torch.get_rng_state(), before)


@by_family
def test_fresh_noise_gives_different_values(family):
    values = []
    for _ in range(20):
        with record_noise():
            values.append(sample(family()))
    assert any(not torch.equal(values[0], value) for value in values[1:])


@pytest.mark.filterwarnings("ignore:Singular sample detected")  # torch's own Wishart sampler
@by_family
def test_noise_to_sample_has_the_law_of_the_distribution(family):
    """Two samples, one through the tape and one from the family's own sampler, coordinate by coordinate and in a sum."""
    n = family.size
    fn = family()
    with record_noise():
        ours = pyro.sample("x", fn, sample_shape=torch.Size([n]))
    ours, theirs = ours.reshape(n, -1).double(), family.draws(n).reshape(n, -1).double()
    columns = [(ours[:, i], theirs[:, i]) for i in range(ours.shape[1])]
    columns.append(
        (ours.sum(-1).round(decimals=12), theirs.sum(-1).round(decimals=12))
    )  # on the simplex, 1 but for rounding
    threshold = SUITE_FAILURE_RATE / len(FAMILIES) / len(columns)
    for a, b in columns:
        assert two_sample_p_value(a, b, family.discrete) > threshold


def two_sample_p_value(a, b, discrete):
    """Kolmogorov-Smirnov for continuous values; chi-squared for discrete ones, with rare values put together."""
    if not discrete:
        return stats.ks_2samp(a.numpy(), b.numpy()).pvalue
    values, index = torch.unique(torch.cat([a, b]), return_inverse=True)
    counts = torch.stack(
        [torch.bincount(index[: len(a)], minlength=len(values)), torch.bincount(index[len(a) :], minlength=len(values))]
    )
    rare = counts.sum(0) < 20
    counts = torch.cat([counts[:, ~rare], counts[:, rare].sum(1, keepdim=True)], 1)
    counts = counts[:, counts.sum(0) > 0]
    return 1.0 if counts.shape[1] < 2 else stats.chi2_contingency(counts.numpy()).pvalue


# Derivatives.

DIFFERENTIABLE = [family for family in FAMILIES.values() if family.gradient == "exact"]


@pytest.mark.parametrize("family", DIFFERENTIABLE, ids=[family.name for family in DIFFERENTIABLE])
def test_autograd_at_frozen_noise_equals_finite_differences(family):
    params = [value.requires_grad_() for value in family.tensors()]
    with record_noise() as noise:
        first = sample(family.make(*params))
    direction = torch.randn_like(first)

    def value_at(*shifted):
        with replay_noise(noise=noise):
            return (sample(family.make(*shifted)) * direction).sum()

    assert family().has_rsample
    gradients = torch.autograd.grad(value_at(*params), params, allow_unused=True)
    for param, gradient in zip(params, gradients, strict=True):
        gradient = torch.zeros_like(param) if gradient is None else gradient  # a discrete choice inside passes none
        numerical = torch.zeros_like(param)
        for i in range(param.numel()):
            step = torch.zeros(param.numel(), dtype=param.dtype)
            step[i] = 1e-5 * max(1.0, abs(float(param.detach().flatten()[i])))
            step = step.view_as(param)
            with torch.no_grad():
                shifted = [[p + s * step if p is param else p for p in params] for s in (1, -1)]
                difference = value_at(*shifted[0]) - value_at(*shifted[1])
            numerical.view(-1)[i] = difference / (2 * step.abs().sum())
        scale = 1 + float(numerical.abs().max())
        assert torch.allclose(gradient, numerical, rtol=0, atol=family.atol * scale), (gradient, numerical)


NO_GRADIENT = [family for family in FAMILIES.values() if family.gradient == "none"]


@pytest.mark.parametrize("family", NO_GRADIENT, ids=[family.name for family in NO_GRADIENT])
def test_families_without_rsample_pass_no_gradient(family):
    fn = family.make(*[value.requires_grad_() for value in family.tensors()])
    with record_noise():
        assert not sample(fn).requires_grad
    assert not has_derivative(fn)


def test_the_gamma_derivative_is_that_of_torch(float64):
    """The size of GAMMA_ACCURACY: torch's implicit derivative of a gamma draw is itself an approximation."""
    from pyro_kd.noise.quantiles import gamma_quantile

    u, a = torch.rand(2000), torch.rand(2000) * 5 + 0.2
    x = gamma_quantile(u, a)
    numerical = (gamma_quantile(u, a + 1e-5) - gamma_quantile(u, a - 1e-5)) / 2e-5
    error = (torch._standard_gamma_grad(a, x) - numerical).abs() / (1 + numerical.abs())
    assert error.max() < GAMMA_ACCURACY


# Families that are not covered are refused.


@pytest.mark.parametrize("name", WITHOUT_SAMPLER)
def test_families_without_a_sampler_are_refused(name):
    with (
        record_noise(),
        pytest.raises(UnsupportedNoiseError, match=f"site 'x': {name} cannot be sampled: .*register_sampler"),
    ):
        sample(WITHOUT_SAMPLER[name]())


def test_every_public_family_is_covered_or_refused():
    """A family that Pyro adds must enter one of the two tables."""
    public = {
        name
        for name, cls in vars(dist).items()
        if inspect.isclass(cls) and issubclass(cls, torch.distributions.Distribution)
    }
    abstract = {"TorchDistribution", "ExponentialFamily"}
    need_no_case = {"Delta", "Unit", "ExpandedDistribution", "LKJCorrCholesky"}  # see tests/noise/test_handlers.py
    known = {name.split("(")[0] for name in FAMILIES} | set(WITHOUT_SAMPLER)
    assert public - abstract - need_no_case == known


class Halving(dist.TorchDistribution):
    """A family of a user's own, by rejection one value at a time: uniform on [low, 1]."""

    arg_constraints = {}
    has_rsample = False

    def __init__(self, low):
        self.low = low
        super().__init__(low.shape, torch.Size(), validate_args=False)

    def sample(self, sample_shape=()):
        values = torch.full((*sample_shape, *self.batch_shape), -1.0, dtype=self.low.dtype)
        while (missing := values < self.low).any():
            values[missing] = torch.rand(int(missing.sum()), dtype=self.low.dtype)
        return values

    def log_prob(self, value):
        return -(1 - self.low).log().expand(value.shape)


def test_a_users_rejection_sampler_keeps_its_law(float64):
    """Also on noise of which the record holds too little, or in other shapes."""
    low = torch.full((20_000,), 0.6)
    with record_noise() as noise:
        teacher = sample(Halving(low))
    for shift in (0.0, 0.02, 0.3):
        with replay_noise(noise=noise):
            student = sample(Halving(low + shift))
        p_value = stats.kstest((student.numpy() - 0.6 - shift) / (0.4 - shift), "uniform").pvalue
        assert p_value > SUITE_FAILURE_RATE
        if shift == 0:
            assert torch.equal(student, teacher)
