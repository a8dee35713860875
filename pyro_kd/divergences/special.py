r"""Differences of special functions, as divergences need them, without cancellation.

:math:`\ln\Gamma(10^6)` is about :math:`10^7`, and the divergence of two Dirichlets of that concentration may be :math:`10^{-5}`. Here
the leading terms of Stirling's series are subtracted by hand, so that the rest is small. All functions take float64 tensors that
broadcast, work element by element, and return tensors of the broadcast shape.
"""

import functools
import math

import torch
from torch import Tensor

__all__ = [
    "beta_negentropy",
    "common_dtype",
    "gamma_negentropy",
    "lgamma_divergence",
    "log_sinhc",
    "relative_excess",
    "safe_log",
    "safe_log1m",
    "weighted_log_ratio",
]

_LARGE = 10.0  # from here on, four terms of Stirling's series reach 1e-12
_SMALL = 0.3  # up to here, three terms of the Taylor series below do


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of arithmetic with all of the tensors."""
    return functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])


def relative_excess(first: Tensor, second: Tensor) -> Tensor:
    r""":math:`a h(b / a)` with :math:`h(r) = r - 1 - \ln r`, for positive a = ``first`` and b = ``second``; where a is 0, b."""
    a = torch.where(first > 0, first, 1)
    delta = (second - a) / a
    return torch.where(first > 0, a * (delta - _log_ratio(a, second, delta)), second)


def lgamma_divergence(first: Tensor, second: Tensor) -> Tensor:
    r"""The Bregman divergence of the log gamma function, :math:`\ln\Gamma(b) - \ln\Gamma(a) - (b - a) \psi(a) \ge 0`.

    With :math:`\ln\Gamma(x) = (x - \tfrac12) \ln x - x + c + s(x)` and :math:`\psi(x) = \ln x - \tfrac1{2x} - t(x)`.

    Args:
        first, second: a and b, positive.
    """
    a, b = torch.broadcast_tensors(first, second)
    delta = (b - a) / a
    log_ratio = _log_ratio(a, b, delta)
    leading = a * ((1 + delta) * log_ratio - delta) + 0.5 * (delta - log_ratio)
    return leading + (_lgamma_rest(b) - _lgamma_rest(a)) + (b - a) * _digamma_rest(a)


def gamma_negentropy(concentration: Tensor) -> Tensor:
    r""":math:`E \ln p` of Gamma(a, 1): :math:`(a - 1) \psi(a) - a - \ln\Gamma(a)`."""
    a = concentration
    rest = (1 - a) / (2 * a) - (a - 1) * _digamma_rest(a) - _lgamma_rest(a)
    return rest - 0.5 * a.log() - 0.5 * math.log(2 * math.pi)


def beta_negentropy(a: Tensor, b: Tensor) -> Tensor:
    r""":math:`E \ln p` of Beta(a, b)."""
    total = a + b
    return gamma_negentropy(a) + gamma_negentropy(b) - gamma_negentropy(total) + torch.digamma(total)


def log_sinhc(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r""":math:`\ln(\sinh(x/2) / (x/2))` with its first and second derivative."""
    a = x.abs()
    small = torch.where(a < _SMALL, x, 0).square()
    large = a.clamp(min=_SMALL)
    decay = (-large).exp()
    near = -torch.expm1(-large)  # 1 - exp(-|x|)
    value = large / 2 + near.log() - large.log()
    slope = x.sign() * (0.5 + decay / near - 1 / large)
    curvature = large**-2 - decay / near**2
    series = small / 24 - small**2 / 2880 + small**3 / 181440 - small**4 / 9676800
    root = torch.where(a < _SMALL, x, 0)
    series_slope = root * (1 / 12 - small / 720 + small**2 / 30240 - small**3 / 1209600)
    series_curvature = 1 / 12 - small / 240 + small**2 / 6048 - small**3 / 172800
    is_small = a < _SMALL
    return (
        torch.where(is_small, series, value),
        torch.where(is_small, series_slope, slope),
        torch.where(is_small, series_curvature, curvature),
    )


def _log_ratio(a: Tensor, b: Tensor, delta: Tensor) -> Tensor:
    """Log b / a, in full accuracy even if the two are nearly equal: ``delta`` is (b - a) / a."""
    near = delta.abs() < 0.5
    return torch.where(near, torch.where(near, delta, 0).log1p(), b.log() - a.log())


def _lgamma_rest(x: Tensor) -> Tensor:
    """The log gamma function minus Stirling's formula: s(x)."""
    y = x.clamp(min=_LARGE)
    z = y**-2
    series = (1 / 12 - z * (1 / 360 - z * (1 / 1260 - z / 1680))) / y
    direct = torch.lgamma(x) - ((x - 0.5) * x.log() - x + 0.5 * math.log(2 * math.pi))
    return torch.where(x < _LARGE, direct, series)


def _digamma_rest(x: Tensor) -> Tensor:
    """The leading terms of the digamma function minus the function itself: t(x)."""
    z = x.clamp(min=_LARGE) ** -2
    series = z * (1 / 12 - z * (1 / 120 - z * (1 / 252 - z / 240)))
    return torch.where(x < _LARGE, x.log() - 0.5 / x - torch.digamma(x), series)


def safe_log(value: Tensor) -> Tensor:
    """The logarithm. At 0 it is -inf, with gradient 0."""
    return torch.where(value > 0, torch.where(value > 0, value, 1).log(), -torch.inf)


def safe_log1m(value: Tensor) -> Tensor:
    """The logarithm of 1 - value. At 1 it is -inf, with gradient 0."""
    return torch.where(value < 1, torch.log1p(-torch.where(value < 1, value, 0)), -torch.inf)


def weighted_log_ratio(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The weighted log ratio, p * (log p - log q). Where p is 0, it is 0 with gradient 0, also where q is 0 too."""
    counts = p > 0
    return p * (torch.where(counts, log_p, 0) - torch.where(counts, log_q, 0))
