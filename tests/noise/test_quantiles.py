"""The inverse distribution functions against scipy's, far into both tails."""

import numpy as np
import pytest
import torch
from scipy import special, stats

from pyro_kd.noise.quantiles import binomial_quantile, gamma_quantile, poisson_quantile

pytestmark = pytest.mark.usefixtures("float64")
TAIL = np.logspace(-15, np.log10(0.5), 300)
U = np.concatenate([TAIL, 1 - TAIL])


@pytest.mark.parametrize("concentration", [1e-3, 0.01, 0.1, 0.5, 0.9, 1.0, 1.5, 2.0, 5.0, 10.0, 50.0, 1e3, 1e5])
def test_gamma_quantiles_are_those_of_scipy(concentration):
    expected = special.gammaincinv(concentration, U)
    actual = gamma_quantile(torch.tensor(U), torch.tensor(concentration)).numpy()
    assert np.isfinite(actual).all()
    normal = expected > 1e-300
    np.testing.assert_allclose(actual[normal], expected[normal], rtol=1e-9)


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.1, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4])
def test_poisson_quantiles_are_those_of_scipy(rate):
    u = U[U < 1 - 1e-13]  # beyond, the distribution functions differ by rounding
    actual = poisson_quantile(torch.tensor(u), torch.tensor(rate)).numpy()
    np.testing.assert_array_equal(actual, stats.poisson.ppf(u, rate))


@pytest.mark.parametrize("total_count", [0, 1, 2, 10, 100, 1000, 100_000])
@pytest.mark.parametrize("probs", [0.0, 1e-4, 0.01, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_binomial_quantiles_are_those_of_scipy(total_count, probs):
    u = U[(U < 1 - 1e-11) & (U > 1e-11)]
    actual = binomial_quantile(torch.tensor(u), torch.tensor(total_count), torch.tensor(probs)).numpy()
    np.testing.assert_array_equal(actual, stats.binom.ppf(u, total_count, probs))


def test_binomial_quantiles_take_a_count_for_each_element():
    counts = torch.tensor([0.0, 3.0, 50.0, 2000.0])
    u = torch.tensor([0.2, 0.5, 0.9, 0.999])
    expected = stats.binom.ppf(u.numpy(), counts.numpy(), 0.4)
    np.testing.assert_array_equal(binomial_quantile(u, counts, torch.tensor(0.4)).numpy(), expected)


def test_extremes_are_finite():
    u = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53])
    assert gamma_quantile(u, torch.tensor(0.5)).isfinite().all()
    assert poisson_quantile(u, torch.tensor(4.0)).isfinite().all()
    assert binomial_quantile(u, torch.tensor(9.0), torch.tensor(0.4)).isfinite().all()


def test_quantiles_are_monotone_in_noise_and_parameter():
    u = torch.rand(500).sort().values
    for low, high in (
        (gamma_quantile(u, torch.tensor(2.0)), gamma_quantile(u, torch.tensor(2.5))),
        (poisson_quantile(u, torch.tensor(2.0)), poisson_quantile(u, torch.tensor(2.5))),
        (binomial_quantile(u, torch.tensor(9), torch.tensor(0.4)), binomial_quantile(u, torch.tensor(9), torch.tensor(0.5))),
    ):
        assert (low.diff() >= 0).all()
        assert (high >= low).all()
