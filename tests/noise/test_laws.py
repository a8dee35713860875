"""Noise of one law as noise of another: the increasing map, far into both tails, and what programs make of it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_kd import record_noise, replay_noise
from pyro_kd.noise.laws import NoiseLaw, convert
from tests.support.losses import SurrogateKD

LAWS = {
    NoiseLaw.NORMAL: stats.norm,
    NoiseLaw.UNIFORM: stats.uniform,
    NoiseLaw.EXPONENTIAL: stats.expon,
    NoiseLaw.CAUCHY: stats.cauchy,
}
pairs = pytest.mark.parametrize(("source", "target"), [(a, b) for a in LAWS for b in LAWS], ids=lambda law: law.name)


@pairs
def test_the_conversion_is_the_map_between_quantiles(source, target):
    tail = torch.logspace(-12, math.log10(0.5), 100, dtype=torch.float64)
    lower = convert(torch.as_tensor(LAWS[source].ppf(tail)), source, target)
    assert torch.allclose(lower, torch.as_tensor(LAWS[target].ppf(tail)), rtol=1e-4)
    upper = convert(torch.as_tensor(LAWS[source].isf(tail)), source, target)
    rtol = 1e-3 if source is NoiseLaw.UNIFORM else 1e-4  # 1 - 1e-12 itself has four digits
    assert torch.allclose(upper, torch.as_tensor(LAWS[target].isf(tail)), rtol=rtol)


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_draw_has_a_finite_image_of_the_right_law(source, target, dtype):
    noise = source.sample((20_000,), dtype, torch.device("cpu"))
    if source is NoiseLaw.UNIFORM:
        noise[0] = 0.0
    image = convert(noise, source, target)
    assert image.isfinite().all()
    assert stats.kstest(image.numpy(), LAWS[target].cdf).pvalue > 2e-5 / 32


def test_permutations_are_not_converted():
    assert convert(torch.arange(3), NoiseLaw.PERMUTATION, NoiseLaw.NORMAL) is None
    assert convert(torch.zeros(3), NoiseLaw.NORMAL, NoiseLaw.PERMUTATION) is None


OTHERS = {
    "Laplace": (lambda: dist.Laplace(torch.zeros(2000), 1.0), stats.laplace.cdf),
    "LogNormal": (lambda: dist.LogNormal(torch.zeros(2000), 1.0), stats.lognorm(1.0).cdf),
    "Gamma": (lambda: dist.Gamma(torch.full((2000,), 3.0), 1.0), stats.gamma(3.0).cdf),
    "Exponential": (lambda: dist.Exponential(torch.ones(2000)), stats.expon.cdf),
    "StudentT": (lambda: dist.StudentT(torch.full((2000,), 5.0)), stats.t(5).cdf),
    "Gumbel": (lambda: dist.Gumbel(torch.zeros(2000), 1.0), stats.gumbel_r.cdf),
}


@pytest.mark.parametrize("family", OTHERS)
def test_a_normal_latent_shares_its_noise_with_different_families(family):
    """The student's draw has its own law, and rises with the teacher's."""
    make, cdf = OTHERS[family]
    with record_noise() as noise:
        z = pyro.sample("z", dist.Normal(torch.zeros(2000), 1.0))
    with replay_noise(noise=noise):
        x = pyro.sample("z", make())
    assert stats.kstest(x.numpy(), cdf).pvalue > 2e-5
    assert stats.spearmanr(z, x).statistic > (0.8 if family == "StudentT" else 1 - 1e-6)


def test_a_program_may_take_fewer_draws_than_recorded():
    with record_noise() as noise:
        x = pyro.sample("z", dist.StudentT(torch.full((500,), 30.0)))
    with replay_noise(noise=noise):
        z = pyro.sample("z", dist.Normal(torch.zeros(500), 1.0))
    assert torch.equal(z, noise["z"][0].noise)
    assert stats.spearmanr(z, x).statistic > 0.9


def test_the_bound_holds_between_different_families():
    """z ~ N(0, 1) in the teacher and Laplace in the student, y ~ N(z, 1): against the KL by quadrature."""

    def program(fn):
        def model():
            with pyro.plate("rows", 4000):
                z = pyro.sample("z", fn)
                pyro.sample("y", dist.Normal(z, 1.0))

        return model

    teacher, student = dist.Normal(0.0, 1.0), dist.Laplace(0.3, 0.8)
    values = [SurrogateKD(["y"], latent_weight=0.0).loss(program(student), program(teacher)) / 4000 for _ in range(20)]
    mean, error = torch.tensor(values).mean(), torch.tensor(values).std() / 20**0.5
    z, y = torch.linspace(-12, 12, 2401), torch.linspace(-12, 12, 801)
    log_y = dist.Normal(z, 1.0).log_prob(y.unsqueeze(-1)) + math.log(z[1] - z[0])
    log_p, log_q = ((log_y + fn.log_prob(z)).logsumexp(-1) for fn in (teacher, student))
    truth = (log_p.exp() * (log_p - log_q)).sum() * (y[1] - y[0])
    assert mean - 5 * error > truth > 0
