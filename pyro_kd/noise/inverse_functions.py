r"""Inverse distribution functions as graphs of plain tensor operations of fixed length, for exported programs.

They give the values of :mod:`pyro_kd.noise.quantiles` without its special functions and without loops that depend on values, so
that ``torch.export`` and ONNX can express them: sums, products, quotients, exp, log, sqrt, where, comparisons, floor and cumsum.

The tails of the gamma law, which the Poisson law has too, are integrals of an entire function in the logarithm of the variable.
With x the end of the tail and :math:`F` the lower or the upper tail,

.. math::
    F(x; a) = \frac{x^a e^{-x}}{\Gamma(a)} \left| \int_0^{\mp T} \exp(a t - x (e^t - 1)) \, dt \right|,

where T is chosen so that the integrand has fallen by a factor of :math:`e^{-38}`. The rule of Gauss and Legendre with 30 nodes
gives it to rounding error for every concentration from 1 on. The binomial tails are treated in the same way, in the logarithm of
the odds.

Everything here works element by element, in float64, whatever the type of the arguments. Arguments outside of the stated range give
NaN, since a graph cannot raise. Knows tensors only.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyro_kd.noise.special_functions import (
    HALF_LOG_2_PI,
    constant,
    excess_of_exp,
    lgamma1p,
    log1p,
    log_ratio,
    open_unit,
    rough_normal_icdf,
    stirling_error,
)

__all__ = ["binomial_icdf", "gamma_icdf", "poisson_icdf"]

_GAMMA_STEPS = 3  # of Halley's method
_LEAST = 2.0**-100  # of a concentration; a mean below it is 0 for all u
_LARGEST_CONCENTRATION = 1e10  # beyond, exp(t) - 1 loses too many digits at the nodes
_LARGEST_COUNT = 1e8  # of a mean or of trials; beyond, the window is too narrow for the rough guess
_DEPTH = 38.0  # of the integrand, as a logarithm: exp(-38) is below the rounding error
_HALF_WINDOW = 16  # counts on either side of the Cornish-Fisher guess

_nodes, _weights = np.polynomial.legendre.leggauss(30)
_NODES, _WEIGHTS = ((1 + _nodes) / 2).tolist(), (_weights / 2).tolist()
_LOG_2 = math.log(2)
_SERIES = tuple((-1) ** n / math.factorial(n) for n in range(1, 21))


def _is_probability(u: Tensor) -> Tensor:
    return (u >= 0) & (u <= 1)


def _integral(log_integrand: Callable[[Tensor], Tensor], length: Tensor) -> Tensor:
    """The integral of ``exp(log_integrand(t))`` for t from 0 to a length of either sign, taken as positive."""
    nodes = torch.tensor(_NODES, dtype=length.dtype, device=length.device)
    weights = torch.tensor(_WEIGHTS, dtype=length.dtype, device=length.device)
    return (log_integrand(length.unsqueeze(-1) * nodes).exp() * weights).sum(-1) * length.abs()


def _lower_length(slope: Tensor, curvature: Tensor) -> Tensor:
    """A t at which ``slope * t + curvature * t^2 / (2 + t)`` reaches the depth."""
    b = 2 * slope - _DEPTH
    return 4 * _DEPTH / (b + (b * b + 8 * _DEPTH * (slope + curvature)).sqrt())


def _upper_length(a: Tensor, x: Tensor) -> Tensor:
    """A t at which ``x (exp(t) - 1) - a t`` exceeds the depth, for x above the median of Gamma(a) or above 1."""
    slope = x - a
    t = 2 * _DEPTH / (slope + (slope * slope + 2 * _DEPTH * x).sqrt())
    return torch.minimum(t, (1 + (_DEPTH + a * t) / x).log())


def _gamma_tail(a: Tensor, x: Tensor, lower: Tensor) -> Tensor:
    r"""The integral of the module's docstring: a tail of Gamma(a) in units of :math:`x^a e^{-x} / \Gamma(a)`."""
    rate = torch.where(lower, a + 1, a)  # the lower tail by that of a + 1, whose integrand falls faster
    length = torch.where(lower, -_lower_length(rate - x, x), _upper_length(a, x))
    rates, ends = rate.unsqueeze(-1), x.unsqueeze(-1)
    integral = _integral(lambda t: rates * t - ends * (t.exp() - 1), length)
    return torch.where(lower, (1 + x * integral) / a, integral)


def gamma_icdf(u: Tensor, concentration: Tensor) -> Tensor:
    """Quantile function of Gamma(concentration, rate=1).

    Halley's method on the logarithm of the smaller tail, as a function of log x. The lower tail of a concentration below 1 is the
    power series of the incomplete gamma function.

    Args:
        u: probabilities in [0, 1], any shape.
        concentration: from 1e-30 to 1e10, broadcastable with ``u``.

    Returns:
        float64 tensor of the broadcast shape; NaN outside of the range. A quantile below the least number is 0.

    Example:
        >>> gamma_icdf(torch.tensor([0.25, 0.75]), torch.tensor(1.0))  # the exponential law: -log(1 - u)
        tensor([0.2877, 1.3863], dtype=torch.float64)
    """
    raw, a = torch.broadcast_tensors(u.double(), concentration.double())
    u = open_unit(raw)
    is_small, half_log_2_pi = a < 1, constant(HALF_LOG_2_PI, a)
    # For a < 1 the tails are divided at x = 1 or close to it, where the upper one is about ``above``.
    above = a * (0.2194 + 0.1485 * a)
    lower = (is_small & (1 - u > above)) | (~is_small & (u <= 0.5))
    by_series = is_small & lower
    log_u = torch.where(u < 0.5, u.log(), log1p(u - 1))
    log_tail = torch.where(lower, log_u, (1 - u).log())
    log_a, error = a.log(), stirling_error(a.clamp(min=1))
    log_gamma_1 = torch.where(is_small, lgamma1p(a.clamp(max=1)), (a + 0.5) * log_a - a + half_log_2_pi + error)
    # log(x^a e^-x / Gamma(a)) at x = a
    at_mean = torch.where(is_small, (a + 1) * log_a - a - log_gamma_1, 0.5 * log_a - half_log_2_pi - error)
    # Start: Wilson and Hilferty's cube where it is accurate; else the first two terms of the lower tail or, in the upper tail of
    # a < 1, an exponential law from x = 1 on.
    cube = 1 - 1 / (9 * a) + rough_normal_icdf(u) / (3 * a.sqrt())
    leading = (log_u + log_gamma_1) / a
    leading = leading + leading.clamp(max=_LOG_2).exp() / (a + 1)
    y = torch.where(is_small | (cube < 0.1), leading, log_a + 3 * cube.clamp(min=0.1).log())
    w = torch.where(is_small & ~lower, (1 + (above / (1 - u)).log().clamp(min=0.0)).log(), y) - log_a
    for _ in range(_GAMMA_STEPS):
        x = a * w.exp()
        series = log1p(_series(a, (w + log_a).clamp(max=_LOG_2)))
        tail = _gamma_tail(a, torch.where(by_series, 1.0, x), lower)
        tail = torch.where(by_series, (x + series).exp() / a, tail)
        log_f = torch.where(by_series, a * (w + log_a) - log_gamma_1 + series, at_mean - a * excess_of_exp(w) + tail.log())
        slope = torch.where(lower, 1 / tail, -1 / tail)  # d log F / dw
        newton = (log_f - log_tail) / slope
        w = w - (newton / (1 - 0.5 * newton * (a - x - slope)).clamp(min=0.5)).clamp(-8, 8)
    inside = _is_probability(raw) & (a >= _LEAST) & (a <= _LARGEST_CONCENTRATION)
    return torch.where(inside, (log_a + w).exp(), torch.nan)


def _series(a: Tensor, log_x: Tensor) -> Tensor:
    r"""The sum of :math:`a (-x)^n / (n! (a + n))` over n from 1 to 20, for a lower tail at x below 2."""
    n = torch.arange(1, len(_SERIES) + 1, dtype=a.dtype, device=a.device)
    coefficients = torch.tensor(_SERIES, dtype=a.dtype, device=a.device)
    a = a.unsqueeze(-1)
    return ((n * log_x.unsqueeze(-1)).exp() * coefficients * (a / (a + n))).sum(-1)


def poisson_icdf(u: Tensor, rate: Tensor) -> Tensor:
    """Quantile function of Poisson(rate): the smallest k with P(X <= k) >= u.

    The masses are added up, from the outside, in a window around the approximation of Cornish and Fisher; what lies outside of it is
    a tail of the gamma law. A window that does not hold the quantile gives NaN.

    Args:
        u: probabilities in [0, 1], any shape.
        rate: from 0 to 1e8, broadcastable with ``u``.

    Returns:
        float64 tensor of the broadcast shape with integer values; NaN outside of the range.

    Example:
        >>> poisson_icdf(torch.tensor([0.1, 0.9]), torch.tensor(3.0))
        tensor([1., 5.], dtype=torch.float64)
    """
    raw, rate = torch.broadcast_tensors(u.double(), rate.double())
    u, mean = open_unit(raw), rate.clamp(_LEAST, _LARGEST_COUNT)
    z, left = rough_normal_icdf(u), u <= 0.5
    guess = (mean + z * mean.sqrt() + (z * z - 1) / 6).floor()
    start = torch.where(left, guess - _HALF_WINDOW, guess + _HALF_WINDOW).clamp(min=0)
    # Left: P(X <= start + j), j = 0, 1, ... Right: P(X > start - j).
    log_mass = _log_poisson_mass(start, mean)
    tail = mean * _gamma_tail(start + 1, mean, ~left)
    first = log_mass.exp() * torch.where(left & (start == 0), 1.0, tail)
    i = _window_steps(u)
    ratios = torch.where(
        left.unsqueeze(-1),
        mean.unsqueeze(-1) / (start.unsqueeze(-1) + i),
        torch.where(i == 1, 1.0, (start.unsqueeze(-1) + 2 - i).clamp(min=0) / mean.unsqueeze(-1)),
    )
    totals = _totals(first, log_mass, ratios)
    below = (totals < torch.where(left, u, 1 - u).unsqueeze(-1)).double().sum(-1)
    at_most = (totals <= (1 - u).unsqueeze(-1)).double().sum(-1)
    value = torch.where(left, start + below, start + 1 - at_most)
    steps = torch.where(left, below, at_most)
    found = ((steps > 0) | (left & (start == 0))) & (steps < totals.shape[-1])
    inside = _is_probability(raw) & (rate >= 0) & (rate <= _LARGEST_COUNT) & found
    return torch.where(inside, torch.where(rate > 0, value, 0.0), torch.nan)


def _log_poisson_mass(k: Tensor, rate: Tensor) -> Tensor:
    """By the deviance (Loader 2000), which keeps the digits of large counts."""
    count = k.clamp(min=1)
    deviance = count * excess_of_exp(log_ratio(rate, count, rate - count))
    at_count = -deviance - stirling_error(count) - 0.5 * count.log() - constant(HALF_LOG_2_PI, rate)
    return torch.where(k > 0, at_count, -rate)


def _window_steps(u: Tensor) -> Tensor:
    return torch.arange(1, 2 * _HALF_WINDOW + 1, dtype=u.dtype, device=u.device)


def _totals(first: Tensor, log_mass: Tensor, ratios: Tensor) -> Tensor:
    """Running totals of a first total and of masses, whose ratios to the mass before are given along a last dimension."""
    masses = (log_mass.unsqueeze(-1) + ratios.log().cumsum(-1)).exp()
    return torch.cat([first.unsqueeze(-1), first.unsqueeze(-1) + masses.cumsum(-1)], -1)


def binomial_icdf(u: Tensor, total_count: Tensor, probs: Tensor) -> Tensor:
    """Quantile function of Binomial(total_count, probs): the smallest k with P(X <= k) >= u.

    As for the Poisson law; the masses are added up from the left, for u > 1/2 those of ``total_count - X``.

    Args:
        u: probabilities in [0, 1], any shape.
        total_count: integers from 0 to 1e8, broadcastable with ``u``.
        probs: in [0, 1], broadcastable with ``u``.

    Returns:
        float64 tensor of the broadcast shape with integer values; NaN outside of the range.

    Example:
        >>> binomial_icdf(torch.tensor([0.1, 0.9]), torch.tensor(10), torch.tensor(0.5))
        tensor([3., 7.], dtype=torch.float64)
    """
    raw, count, probs = torch.broadcast_tensors(u.double(), total_count.double(), probs.double())
    u, left = open_unit(raw), raw <= 0.5
    n = count.clamp(0, _LARGEST_COUNT)
    p = torch.where(left, probs, 1 - probs).clamp(_LEAST, 1.0)
    q = torch.where(left, 1 - probs, probs).clamp(_LEAST, 1.0)
    z = rough_normal_icdf(u)
    z = torch.where(left, z, -z)
    guess = (n * p + z * (n * p * q).sqrt() + (z * z - 1) * (q - p) / 6).floor()
    start = torch.minimum((guess - _HALF_WINDOW).clamp(min=0), n)
    log_mass = _log_binomial_mass(start, n, p, q)
    first = log_mass.exp() * torch.where(start > 0, (n - start) * p * _binomial_tail(start, n, p, q), 1.0)
    i = _window_steps(u)
    ratios = ((n - start + 1).unsqueeze(-1) - i).clamp(min=0) / (start.unsqueeze(-1) + i) * (p / q).unsqueeze(-1)
    totals = _totals(first, log_mass, ratios)
    below = (totals < u.unsqueeze(-1)).double().sum(-1)
    at_most = (totals <= (1 - u).unsqueeze(-1)).double().sum(-1)
    steps = torch.where(left, below, at_most)
    value = torch.where(left, start + steps, n - start - steps).clamp(min=0)
    found = ((steps > 0) | (start == 0)) & ((steps < totals.shape[-1]) | (start + steps > n))
    value = torch.where(probs <= 0, 0.0, torch.where(probs >= 1, n, torch.minimum(value, n)))
    is_law = (count >= 0) & (count <= _LARGEST_COUNT) & (count == count.floor()) & _is_probability(probs)
    return torch.where(is_law & _is_probability(raw) & (found | (probs <= 0) | (probs >= 1)), value, torch.nan)


def _log_binomial_mass(k: Tensor, n: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """By the deviance (Loader 2000); k = 0 or 0 < k < n."""
    some, rest = k.clamp(min=1), (n - k).clamp(min=1)
    excess = k - n * p
    deviance = some * excess_of_exp(log_ratio(n * p, some, -excess)) + rest * excess_of_exp(log_ratio(n * q, rest, excess))
    of_n, of_some, of_rest = stirling_error(torch.stack([n.clamp(min=1), some, rest])).unbind()
    error = of_n - of_some - of_rest
    inside = error - deviance - constant(HALF_LOG_2_PI, n) + 0.5 * (n.clamp(min=1).log() - some.log() - rest.log())
    return torch.where(k > 0, inside, n * torch.where(p < 0.5, log1p(-p.clamp(max=0.5)), q.log()))


def _binomial_tail(k: Tensor, n: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """P(X <= k) in units of (n - k) p P(X = k), for k below the median, as an integral over the logarithm of the odds."""
    rate = n - k
    length = -_lower_length(rate - (n + 1) * q, (n + 1) * p * q)
    rate, trials, p, q = (x.unsqueeze(-1) for x in (rate, n + 1, p, q))
    return _integral(lambda t: rate * t - trials * (p + q * t.exp()).log(), length)
