"""KL divergences by counts and histograms, against closed forms."""

import math

import pytest
import torch
from torch.distributions import Categorical, Normal, Poisson, kl_divergence

from pyro_kd.metrics import Estimate, count_kl, histogram_kl
from tests.support.estimates import assert_honest_errors, assert_within

# Counts.

COUNTED = {
    "categorical": (Categorical(torch.tensor([0.5, 0.3, 0.2])), Categorical(torch.tensor([0.2, 0.3, 0.5]))),
    "poisson": (Poisson(3.0), Poisson(4.0)),
}


@pytest.mark.parametrize("case", ["categorical", "poisson"])
def test_count_kl_agrees_with_the_exact_divergence(case):
    p, q = COUNTED[case]
    assert_within(count_kl(p.sample((50_000,)), q.sample((40_000,))), float(kl_divergence(p, q)))


def test_count_kl_of_rows_is_the_sum_over_independent_numbers():
    p, q = torch.tensor([0.5, 0.2, 0.7]), torch.tensor([0.4, 0.4, 0.4])
    truth = float(kl_divergence(torch.distributions.Bernoulli(p), torch.distributions.Bernoulli(q)).sum())
    x, y = (torch.bernoulli(probs.expand(20_000, 3)) for probs in (p, q))
    assert_within(count_kl(x, y), truth)


def test_count_kl_is_the_formula_by_hand():
    """One cell of x's only: the formula of the module."""
    estimate = count_kl(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0]))
    expected = 0.75 * math.log(0.75 * 2 / 2.5) + 0.25 * math.log(0.25 * 2 / 0.5) - 1 / 8 + 1 / 4
    assert estimate.mean == pytest.approx(expected, rel=1e-12)
    assert estimate.num_samples == 6


def test_the_standard_error_of_counts_is_the_formula_by_hand():
    """Variances of the log ratio under p, and of the ratio under q."""
    ratio = [0.5 * 4 / 3.5, 0.5 * 4 / 1.5]
    log_ratio = [math.log(r) for r in ratio]
    variance_p = 0.25 * (log_ratio[0] - log_ratio[1]) ** 2
    variance_q = 0.75 * 0.25 * (ratio[0] - ratio[1]) ** 2
    estimate = count_kl(torch.tensor([0, 1]), torch.tensor([0, 0, 0, 1]))
    assert estimate.standard_error == pytest.approx(math.sqrt(variance_p / 2 + variance_q / 4), rel=1e-12)


def test_bias_and_standard_error_of_counts_are_right():
    p, q = COUNTED["categorical"]
    truth = float(kl_divergence(p, q))
    estimates = [count_kl(p.sample((500,)), q.sample((400,))) for _ in range(400)]
    means = torch.tensor([e.mean for e in estimates])
    assert abs(float(means.mean()) - truth) < 5 * float(means.std()) / 20
    assert_honest_errors(estimates, truth)


def test_count_kl_of_equal_laws_is_0_on_average():
    """Without its corrections the estimate would be (K - 1) (1/n + 1/m) / 2 = 0.0475, many standard errors too large."""
    p = Categorical(torch.ones(20))
    means = torch.tensor([count_kl(p.sample((400,)), p.sample((400,))).mean for _ in range(400)])
    assert abs(float(means.mean())) < 5 * float(means.std()) / 20
    assert 5 * float(means.std()) / 20 < 0.0475


def test_count_kl_of_disjoint_supports_is_finite():
    estimate = count_kl(torch.zeros(100), torch.ones(100))
    assert estimate.mean == pytest.approx(math.log(200) + 1 / 200, rel=1e-12)


def test_count_kl_refuses_values_that_are_not_integers():
    with pytest.raises(ValueError, match="not integers; use histogram_kl or density_ratio_kl"):
        count_kl(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 1.0]))


# Histograms.


def _binned_truth(p, q, edges):
    """KL of the binned laws, tails in the outermost bins."""
    inner = edges[1:-1]
    masses = [torch.cat([d.cdf(inner), torch.ones(1)]) - torch.cat([torch.zeros(1), d.cdf(inner)]) for d in (p, q)]
    return float((masses[0] * (masses[0] / masses[1]).log()).sum())


@pytest.mark.usefixtures("float64")
def test_histogram_kl_agrees_with_that_of_the_binned_laws():
    p, q = Normal(0.5, 1.2), Normal(0.0, 1.0)
    truth = _binned_truth(p, q, torch.linspace(-2, 2, 9))
    assert truth < float(kl_divergence(p, q)) - 0.01
    estimates = [histogram_kl(p.sample((2000,)), q.sample((1500,)), bins=8, range=(-2.0, 2.0)) for _ in range(100)]
    assert isinstance(estimates[0], Estimate)
    assert_honest_errors(estimates, truth)


@pytest.mark.parametrize(("mean", "scale"), [(1.0, 1.0), (0.0, 0.5)])
def test_histogram_kl_tends_to_that_of_the_laws(mean, scale):
    p, q = Normal(mean, scale), Normal(0.0, 1.0)
    assert_within(histogram_kl(p.sample((100_000,)), q.sample((100_000, 1))[:, 0]), float(kl_divergence(p, q)))


def test_histogram_kl_of_equal_laws_is_0_on_average():
    means = torch.tensor([histogram_kl(torch.rand(2000), torch.rand(2000), bins=20).mean for _ in range(200)])
    assert abs(float(means.mean())) < 5 * float(means.std()) / 200**0.5


def test_bins_agree_with_counts():
    x, y = torch.randint(0, 10, (200,)), torch.randint(0, 8, (200,))
    assert histogram_kl(x, y, bins=10, range=(-0.5, 9.5)) == count_kl(x, y)


def test_histogram_kl_of_constant_samples_is_only_the_correction():
    """One cell: log(m / (m + 1/2)) + 1 / 2m is 1 / 8m^2 but for a third-order term."""
    assert histogram_kl(torch.ones(100), torch.ones(100)).mean == pytest.approx(1 / 8e4, abs=1 / 24e6)


def test_invalid_histograms_are_refused():
    x = torch.randn(10)
    with pytest.raises(
        ValueError, match=r"one number per value, shape \(n,\) or \(n, 1\), not \(10, 2\); use density_ratio_kl"
    ):
        histogram_kl(torch.zeros(10, 2), torch.zeros(10, 2))
    with pytest.raises(ValueError, match="bins must be a whole number of at least 1, not 0"):
        histogram_kl(x, x, bins=0)
    for wrong in [(1.0, 1.0), (2.0, 1.0), (0.0, math.nan)]:
        with pytest.raises(ValueError, match="lower < upper"):
            histogram_kl(x, x, range=wrong)


def test_integers_that_float64_does_not_tell_apart_are_refused():
    x = torch.arange(4) + 2**53
    with pytest.raises(ValueError, match="x holds integers beyond"):
        count_kl(x, torch.arange(4))
