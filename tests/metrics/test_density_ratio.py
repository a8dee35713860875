"""KL divergences by density ratios, against closed forms."""

import math
import sys

import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyro_kd.metrics import KLEstimate, density_ratio_kl
from tests.support.estimates import assert_honest_errors, assert_within


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
def test_density_ratio_kl_agrees_with_the_exact_divergence(case):
    p, q = PAIRS[case]
    estimate = density_ratio_kl(p.sample((5000,)), q.sample((4000,)))
    assert_within(estimate, float(kl_divergence(p, q)))
    assert estimate.standard_error < 0.15
    assert estimate.num_samples == 9000


@pytest.mark.slow
def test_standard_errors_and_intervals_of_density_ratios_are_right():
    """The error of the classifier counts: Var_p(T) / n alone would be too short."""
    p, q = PAIRS["shift, 1/2"]
    estimates = [density_ratio_kl(p.sample((1500,)), q.sample((1000,)), seed=i, folds=3) for i in range(40)]
    assert_honest_errors(estimates, 0.5)


def test_the_interval_is_normal():
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
    assert_within(density_ratio_kl(x, y), 3 * 0.125)


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


def test_a_different_classifier_may_be_given():
    """A linear one is right for a shift, and does not see a change of width."""
    x, y = torch.randn(4000) + 1, torch.randn(4000)
    assert_within(density_ratio_kl(x, y, classifier=LogisticRegression()), 0.5)
    narrow = density_ratio_kl(torch.randn(4000) * 0.5, y, classifier=LogisticRegression())
    assert narrow.mean < 0.01 < float(kl_divergence(Normal(0.0, 0.5), Normal(0.0, 1.0))) - 0.3


def test_a_classifier_that_is_certain_gives_a_finite_estimate():
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


def test_invalid_arguments_of_density_ratio_kl_are_refused(monkeypatch):
    x = torch.randn(10)
    with pytest.raises(ValueError, match="folds must be at least 2, not 1"):
        density_ratio_kl(x, x, folds=1)
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            density_ratio_kl(x, x, level=level)
    with pytest.raises(ValueError, match="at least 5 values, but y has 4"):
        density_ratio_kl(x, x[:4])
    with pytest.raises(ValueError, match=r"finite probabilities of shape \(4, 2\), but returned shape \(4, 1\)"):
        density_ratio_kl(x, x, classifier=_Wrong(lambda n: torch.ones(n, 1).numpy()))
    with pytest.raises(ValueError, match="with NaN or infinite entries"):
        density_ratio_kl(x, x, classifier=_Wrong(lambda n: torch.full((n, 2), torch.nan).numpy()))
    monkeypatch.setitem(sys.modules, "sklearn.preprocessing", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install scikit-learn, or pyro-kd\[metrics\]. Or pass a classifier"):
        density_ratio_kl(x, x)
