"""Whether estimates agree with the truth within their standard errors."""

from scipy.stats import chi2


def assert_within(estimate, truth):
    assert abs(estimate.mean - truth) < 5 * estimate.standard_error


def assert_honest_errors(estimates, truth):
    """Squared errors in units of the standard errors sum to chi-squared; both tails one in a million."""
    total = sum(((e.mean - truth) / e.standard_error) ** 2 for e in estimates)
    assert chi2.ppf(1e-6, len(estimates)) < total < chi2.ppf(1 - 1e-6, len(estimates))
