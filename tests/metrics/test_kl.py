"""Divergences between samples against closed forms."""

import math
import sys

import pytest
import torch
from scipy.stats import chi2
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from torch.distributions import Categorical, MultivariateNormal, Normal, Poisson, kl_divergence

from pyro_kd.metrics import Estimate, KLEstimate, count_kl, density_ratio_kl, histogram_kl


def _assert_within(estimate, truth):
    assert abs(estimate.mean - truth) < 5 * estimate.standard_error


def _assert_honest_errors(estimates, truth):
    """Squared errors in units of the standard errors sum to chi-squared; both tails one in a million."""
    total = sum(((e.mean - truth) / e.standard_error) ** 2 for e in estimates)
    assert chi2.ppf(1e-6, len(estimates)) < total < chi2.ppf(1 - 1e-6, len(estimates))


# Counts.

COUNTED = {
    "categorical": (Categorical(torch.tensor([0.5, 0.3, 0.2])), Categorical(torch.tensor([0.2, 0.3, 0.5]))),
    "poisson": (Poisson(3.0), Poisson(4.0)),
}


@pytest.mark.parametrize("case", ["categorical", "poisson"])
def test_count_kl(case):
    p, q = COUNTED[case]
    _assert_within(count_kl(p.sample((50_000,)), q.sample((40_000,))), float(kl_divergence(p, q)))


def test_count_kl_of_rows_is_the_sum_over_independent_numbers():
    p, q = torch.tensor([0.5, 0.2, 0.7]), torch.tensor([0.4, 0.4, 0.4])
    truth = float(kl_divergence(torch.distributions.Bernoulli(p), torch.distributions.Bernoulli(q)).sum())
    x, y = (torch.bernoulli(probs.expand(20_000, 3)) for probs in (p, q))
    _assert_within(count_kl(x, y), truth)


def test_count_kl_by_hand():
    """One cell of x's only: the formula of the module."""
    estimate = count_kl(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0]))
    expected = 0.75 * math.log(0.75 * 2 / 2.5) + 0.25 * math.log(0.25 * 2 / 0.5) - 1 / 8 + 1 / 4
    assert estimate.mean == pytest.approx(expected, rel=1e-12)
    assert estimate.num_samples == 6


def test_standard_error_of_counts_by_hand():
    """Variances of the log ratio under p, and of the ratio under q."""
    ratio = [0.5 * 4 / 3.5, 0.5 * 4 / 1.5]
    log_ratio = [math.log(r) for r in ratio]
    variance_p = 0.25 * (log_ratio[0] - log_ratio[1]) ** 2
    variance_q = 0.75 * 0.25 * (ratio[0] - ratio[1]) ** 2
    estimate = count_kl(torch.tensor([0, 1]), torch.tensor([0, 0, 0, 1]))
    assert estimate.standard_error == pytest.approx(math.sqrt(variance_p / 2 + variance_q / 4), rel=1e-12)


def test_bias_and_standard_error_of_counts():
    p, q = COUNTED["categorical"]
    truth = float(kl_divergence(p, q))
    estimates = [count_kl(p.sample((500,)), q.sample((400,))) for _ in range(400)]
    means = torch.tensor([e.mean for e in estimates])
    assert abs(float(means.mean()) - truth) < 5 * float(means.std()) / 20
    _assert_honest_errors(estimates, truth)


def test_equal_laws_of_counts_are_at_zero_on_average():
    """Without its corrections the estimate would be (K - 1) (1/n + 1/m) / 2 = 0.0475, many standard errors too large."""
    p = Categorical(torch.ones(20))
    means = torch.tensor([count_kl(p.sample((400,)), p.sample((400,))).mean for _ in range(400)])
    assert abs(float(means.mean())) < 5 * float(means.std()) / 20
    assert 5 * float(means.std()) / 20 < 0.0475


def test_disjoint_supports_are_finite():
    estimate = count_kl(torch.zeros(100), torch.ones(100))
    assert estimate.mean == pytest.approx(math.log(200) + 1 / 200, rel=1e-12)


def test_count_kl_refuses_what_is_no_integer():
    with pytest.raises(ValueError, match="not integers; use histogram_kl or density_ratio_kl"):
        count_kl(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 1.0]))


# Histograms.


def _binned_truth(p, q, edges):
    """KL of the binned laws, tails in the outermost bins."""
    inner = edges[1:-1]
    masses = [torch.cat([d.cdf(inner), torch.ones(1)]) - torch.cat([torch.zeros(1), d.cdf(inner)]) for d in (p, q)]
    return float((masses[0] * (masses[0] / masses[1]).log()).sum())


@pytest.mark.usefixtures("float64")
def test_histogram_kl_of_the_binned_laws():
    p, q = Normal(0.5, 1.2), Normal(0.0, 1.0)
    truth = _binned_truth(p, q, torch.linspace(-2, 2, 9))
    assert truth < float(kl_divergence(p, q)) - 0.01
    estimates = [histogram_kl(p.sample((2000,)), q.sample((1500,)), bins=8, range=(-2.0, 2.0)) for _ in range(100)]
    assert isinstance(estimates[0], Estimate)
    _assert_honest_errors(estimates, truth)


@pytest.mark.parametrize(("mean", "scale"), [(1.0, 1.0), (0.0, 0.5)])
def test_histogram_kl_tends_to_that_of_the_laws(mean, scale):
    p, q = Normal(mean, scale), Normal(0.0, 1.0)
    _assert_within(histogram_kl(p.sample((100_000,)), q.sample((100_000, 1))[:, 0]), float(kl_divergence(p, q)))


def test_equal_laws_in_bins_are_at_zero_on_average():
    means = torch.tensor([histogram_kl(torch.rand(2000), torch.rand(2000), bins=20).mean for _ in range(200)])
    assert abs(float(means.mean())) < 5 * float(means.std()) / 200**0.5


def test_bins_agree_with_counts():
    x, y = torch.randint(0, 10, (200,)), torch.randint(0, 8, (200,))
    assert histogram_kl(x, y, bins=10, range=(-0.5, 9.5)) == count_kl(x, y)


def test_values_that_are_all_equal():
    """One cell: log(m / (m + 1/2)) + 1 / 2m is 1 / 8m^2 but for a third-order term."""
    assert histogram_kl(torch.ones(100), torch.ones(100)).mean == pytest.approx(1 / 8e4, abs=1 / 24e6)


def test_errors_of_histograms():
    x = torch.randn(10)
    with pytest.raises(
        ValueError, match=r"one number per value, shape \(n,\) or \(n, 1\), not \(10, 2\); use density_ratio_kl"
    ):
        histogram_kl(torch.zeros(10, 2), torch.zeros(10, 2))
    with pytest.raises(ValueError, match="bins must be positive, not 0"):
        histogram_kl(x, x, bins=0)
    for wrong in [(1.0, 1.0), (2.0, 1.0), (0.0, math.nan)]:
        with pytest.raises(ValueError, match="lower < upper"):
            histogram_kl(x, x, range=wrong)


# Density ratios.


def _plane(mean, correlation=0.0):
    return MultivariateNormal(torch.tensor(mean), torch.tensor([[1.0, correlation], [correlation, 1.0]]))


PAIRS = {
    "equal": (Normal(0.0, 1.0), Normal(0.0, 1.0)),
    "shift, 1/8": (Normal(0.5, 1.0), Normal(0.0, 1.0)),
    "shift, 1/2": (Normal(1.0, 1.0), Normal(0.0, 1.0)),
    "shift, 2": (Normal(2.0, 1.0), Normal(0.0, 1.0)),
    "narrow": (Normal(0.0, 0.5), Normal(0.0, 1.0)),
    "equal in the plane": (_plane([0.0, 0.0]), _plane([0.0, 0.0])),
    "shift in the plane": (_plane([0.6, 0.8]), _plane([0.0, 0.0])),
    "correlation": (_plane([0.0, 0.0], 0.8), _plane([0.0, 0.0])),
}


@pytest.mark.parametrize("case", PAIRS)
def test_density_ratio_kl(case):
    p, q = PAIRS[case]
    estimate = density_ratio_kl(p.sample((5000,)), q.sample((4000,)))
    _assert_within(estimate, float(kl_divergence(p, q)))
    assert estimate.standard_error < 0.15
    assert estimate.num_samples == 9000


def test_errors_and_intervals_of_density_ratios():
    """The error of the classifier counts: Var_p(T) / n alone would be too short."""
    p, q = PAIRS["shift, 1/2"]
    estimates = [density_ratio_kl(p.sample((1500,)), q.sample((1000,)), seed=i, folds=3) for i in range(40)]
    _assert_honest_errors(estimates, 0.5)


def test_interval():
    x, y = torch.randn(300) + 1, torch.randn(300)
    narrow, wide = density_ratio_kl(x, y, level=0.6826894921370859), density_ratio_kl(x, y, level=0.95)
    assert isinstance(wide, KLEstimate)
    assert narrow.interval == pytest.approx((wide.mean - wide.standard_error, wide.mean + wide.standard_error))
    assert wide.interval[1] - wide.mean == pytest.approx(1.959963984540054 * wide.standard_error)


def test_the_fold_seed_decides():
    x, y = torch.randn(300) + 1, torch.randn(300)
    assert density_ratio_kl(x, y, seed=1) == density_ratio_kl(x, y, seed=1)
    assert density_ratio_kl(x, y, seed=1).mean != density_ratio_kl(x, y, seed=2).mean


def test_units_do_not_matter():
    x, y = torch.randn(300, 2).double() + 1, torch.randn(300, 2).double()
    assert density_ratio_kl(1e6 * x + 1e8, 1e6 * y + 1e8).mean == pytest.approx(density_ratio_kl(x, y).mean, rel=1e-8)


def test_saturation_is_finite():
    estimate = density_ratio_kl(torch.randn(500) + 100, torch.randn(500))
    assert 3 < estimate.mean <= math.log(1000)
    assert math.isfinite(estimate.standard_error)


def test_constant_numbers_and_more_dimensions():
    x, y = torch.randn(1000, 4) + 0.5, torch.randn(1000, 4)
    x[:, 3] = y[:, 3] = 7.0
    _assert_within(density_ratio_kl(x, y), 3 * 0.125)


class _Exact:
    """The best classifier, given n and m; it records what it is trained on."""

    trained: list = []

    def __init__(self, log_ratio):
        self.log_ratio = log_ratio

    def fit(self, rows, labels):
        self.odds = math.log(labels.sum() / (1 - labels).sum())
        self.trained.append((len(rows), int(labels.sum())))
        return self

    def predict_proba(self, rows):
        p = torch.sigmoid(self.log_ratio(torch.as_tensor(rows)[:, 0]) + self.odds)
        return torch.stack([1 - p, p], 1).numpy()


def test_the_exact_classifier_gives_the_mean_log_ratio():
    """At any sizes: the shares of the training folds are taken out again. The rows arrive standardised."""
    x, y = torch.randn(90).double() + 1, torch.randn(60).double()
    joint = torch.cat([x, y])
    _Exact.trained = []
    estimate = density_ratio_kl(x, y, classifier=_Exact(lambda z: z * joint.std() + joint.mean() - 0.5), folds=3)
    assert estimate.mean == pytest.approx(float((x - 0.5).mean()), rel=1e-10)
    variance = (x - 0.5).var() / 90 + (y - 0.5).exp().var() / 60
    assert estimate.standard_error == pytest.approx(float(variance.sqrt()), rel=1e-10)
    assert _Exact.trained == [(100, 60)] * 3


def test_another_classifier():
    """A linear one is right for a shift, and does not see a change of width."""
    x, y = torch.randn(4000) + 1, torch.randn(4000)
    _assert_within(density_ratio_kl(x, y, classifier=LogisticRegression()), 0.5)
    narrow = density_ratio_kl(torch.randn(4000) * 0.5, y, classifier=LogisticRegression())
    assert narrow.mean < 0.01 < float(kl_divergence(Normal(0.0, 0.5), Normal(0.0, 1.0))) - 0.3


def test_a_classifier_that_is_certain():
    """A forest of one tree says 0 and 1: its infinite log ratios are cut."""
    estimate = density_ratio_kl(torch.randn(200), torch.randn(200), classifier=RandomForestClassifier(1, random_state=0))
    assert math.isfinite(estimate.mean)
    assert abs(estimate.mean) <= math.log(400)
    assert math.isfinite(estimate.standard_error)


def test_the_given_classifier_stays_unfitted():
    classifier = LogisticRegression()
    density_ratio_kl(torch.randn(50), torch.randn(50), classifier=classifier)
    assert not hasattr(classifier, "coef_")


class _Wrong:
    def __init__(self, out):
        self.out = out

    def fit(self, rows, labels):
        return self

    def predict_proba(self, rows):
        return self.out(len(rows))


def test_errors_of_density_ratios(monkeypatch):
    x = torch.randn(10)
    with pytest.raises(ValueError, match="folds must be at least 2, not 1"):
        density_ratio_kl(x, x, folds=1)
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            density_ratio_kl(x, x, level=level)
    with pytest.raises(ValueError, match="at least 5 values, and y has 4"):
        density_ratio_kl(x, x[:4])
    with pytest.raises(ValueError, match=r"finite probabilities of shape \(4, 2\), but returned shape \(4, 1\)"):
        density_ratio_kl(x, x, classifier=_Wrong(lambda n: torch.ones(n, 1).numpy()))
    with pytest.raises(ValueError, match="with NaN or infinite entries"):
        density_ratio_kl(x, x, classifier=_Wrong(lambda n: torch.full((n, 2), torch.nan).numpy()))
    monkeypatch.setitem(sys.modules, "sklearn.preprocessing", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install scikit-learn, or pyro-kd\[metrics\]; or pass one"):
        density_ratio_kl(x, x)
