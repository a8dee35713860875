"""Special functions of plain operations against scipy's and mpmath's."""

import mpmath
import numpy as np
import pytest
import torch
from scipy import special

from pyro_kd.noise.special_functions import (
    excess_of_exp,
    expm1,
    lgamma,
    log1p,
    log_ratio,
    normal_icdf,
    rough_normal_icdf,
    stirling_error,
)

pytestmark = pytest.mark.usefixtures("float64")
TAIL = np.logspace(-16, np.log10(0.5), 500)
U = np.concatenate([TAIL, 1 - TAIL])
U = U[U < 1]


def test_lgamma_is_that_of_scipy():
    x = np.concatenate([np.logspace(-300, 300, 3000), np.linspace(0.01, 20, 1000)])
    np.testing.assert_allclose(lgamma(torch.tensor(x)).numpy(), special.gammaln(x), rtol=2e-13, atol=2e-15)


@pytest.mark.parametrize("x", [1 - 1e-9, 1 + 1e-12, 2 - 1e-12, 2 + 1e-7, 0.4999, 0.5001, 1.4999, 1.5001, 2.4999, 2.5001])
def test_lgamma_keeps_its_digits_at_its_zeros_and_seams(x):
    assert float(lgamma(torch.tensor(x))) == pytest.approx(float(mpmath.loggamma(x)), rel=2e-14)


def test_stirling_errors_are_those_of_mpmath():
    for x in (1.0, 1.7, 5.0, 7.999, 8.0, 20.0, 1e4, 1e9):
        with mpmath.workdps(40):
            exact = mpmath.loggamma(x) - (mpmath.mpf(x) - 0.5) * mpmath.log(x) + x - mpmath.log(2 * mpmath.pi) / 2
        assert float(stirling_error(torch.tensor(x))) == pytest.approx(float(exact), rel=1e-12, abs=2e-14)


def test_normal_quantiles_are_those_of_scipy():
    np.testing.assert_allclose(normal_icdf(torch.tensor(U)).numpy(), special.ndtri(U), rtol=3e-15)
    assert np.abs(rough_normal_icdf(torch.tensor(U)).numpy() - special.ndtri(U)).max() < 5e-4
    assert normal_icdf(torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1p_and_expm1_keep_their_digits(dtype):
    eps = torch.finfo(dtype).eps
    x = torch.logspace(-30, 1.9, 2000, dtype=dtype)
    x = torch.cat([x, -x[x < 0.99], torch.zeros(1, dtype=dtype)])
    np.testing.assert_allclose(log1p(x), np.log1p(x.numpy()), rtol=4 * eps)
    np.testing.assert_allclose(expm1(x), np.expm1(x.numpy()), rtol=4 * eps)
    assert expm1(torch.tensor([-1e3, 1e4], dtype=dtype)).tolist() == [-1.0, float("inf")]


def test_the_excess_of_exp_has_an_error_that_is_small_against_its_argument():
    x = torch.cat([torch.logspace(-12, 1, 400), -torch.logspace(-12, 1, 400)])
    with mpmath.workdps(40):
        exact = np.array([float(mpmath.expm1(v) - v) for v in x.tolist()])
    assert (np.abs(excess_of_exp(x).numpy() - exact) <= 1e-14 * x.abs().numpy() * np.maximum(1, np.abs(exact))).all()


def test_log_ratios_keep_their_digits_near_1_and_far_away():
    x = torch.tensor([1e8 + 1, 1e8 - 1e4, 1e-300, 3.0])
    y = torch.tensor([1e8, 1e8, 1e8, 3.0])
    with mpmath.workdps(40):
        exact = [float(mpmath.log(mpmath.mpf(a) / mpmath.mpf(b))) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    np.testing.assert_allclose(log_ratio(x, y, x - y).numpy(), exact, rtol=1e-15)
