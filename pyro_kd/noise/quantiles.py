r"""Inverse distribution functions that torch lacks: gamma, Poisson and binomial.

They are the maps :math:`g` of the semi-auxiliary form (Chen et al. 2023, section 3.1) for laws whose sampler in torch
is a rejection loop, and so not a function of a fixed number of draws. All are non-decreasing in ``u``, and larger
parameters give larger draws: the optimal coupling of ordered variables. Everything here works element by element, in
float64, on the device of its arguments. Knows tensors only.

The gamma quantile carries no gradient of its own: autograd's formula for ``torch._standard_gamma`` is the implicit
derivative :math:`-\partial_a F(x; a) / f(x; a)`, which is exactly that of the inverse distribution function.
"""

import torch
from torch import Tensor

from pyro_kd.utils import guards

__all__ = ["binomial_quantile", "gamma_quantile", "poisson_quantile"]

_NEWTON_STEPS = 6  # one more than reaches 1e-7 at the worst concentration tried, 0.001; see tests/noise/test_quantiles.py
_POISSON_BRACKET = 64  # half width around the Cornish-Fisher guess, checked against scipy in tests/noise/test_quantiles.py


def _open_unit(u: Tensor) -> Tensor:
    """Move uniforms into the open interval (0, 1) in float64."""
    return u.double().clamp(2.0**-54, 1 - 2.0**-53)


def gamma_quantile(u: Tensor, concentration: Tensor) -> Tensor:
    """Quantile function of Gamma(concentration, rate=1).

    Newton's method on the logarithm of the better conditioned tail, as a function of log x. Both log tails are concave in it, so
    the iteration converges from any start on the near side of the root.

    Args:
        u: probabilities in [0, 1), any shape.
        concentration: positive, broadcastable with ``u``.

    Returns:
        float64 tensor of the broadcast shape.
    """
    u, a = torch.broadcast_tensors(_open_unit(u), concentration.double())
    lower = torch.where(a < 1, u < torch.special.gammainc(a, torch.ones_like(a)), u < 0.5)
    log_tail = torch.where(lower, u.log(), torch.log1p(-u))
    # Start: Wilson and Hilferty's cube if it is accurate; else the leading term of the lower tail or, in the upper
    # tail of a < 1, the quantile of the exponential law, which is larger.
    y_small = (u.log() + torch.lgamma(a + 1)) / a
    cube = 1 - 1 / (9 * a) + torch.special.ndtri(u) / (3 * a.sqrt())
    y_cube = a.log() + 3 * cube.clamp(min=0.1).log()
    y_above = (-torch.log1p(-u)).log()
    y = torch.where((a < 1) & ~lower, y_above, torch.where((a < 1) | (cube < 0.1), y_small, y_cube))
    log_norm = torch.lgamma(a)
    for _ in range(_NEWTON_STEPS):
        x = y.exp()
        tail = torch.where(lower, torch.special.gammainc(a, x), torch.special.gammaincc(a, x))
        log_f = tail.log()
        # d log F / dy = x f(x) / F, where log(x f(x)) = a y - x - lgamma(a).
        slope = (a * y - x - log_norm - log_f).exp()
        step = (log_f - log_tail) / torch.where(lower, slope, -slope)
        y = y - torch.where(step.isfinite(), step.clamp(-8, 8), 0)
        y = torch.where(log_f.isinf() & lower, y_small, y)  # underflow of the lower tail: its leading term is exact
    return y.exp()


def poisson_quantile(u: Tensor, rate: Tensor) -> Tensor:
    """Quantile function of Poisson(rate): the smallest k with P(X <= k) >= u.

    Bisection on the integers, with P(X <= k) = Q(k + 1, rate), around the Cornish-Fisher approximation.

    Args:
        u: probabilities in [0, 1), any shape.
        rate: non-negative, broadcastable with ``u``.

    Returns:
        float64 tensor of the broadcast shape with integer values.
    """
    u, rate = torch.broadcast_tensors(_open_unit(u), rate.double())
    z = torch.special.ndtri(u)
    guess = (rate + z * rate.sqrt() + (z * z - 1) / 6).floor()
    low = (guess - _POISSON_BRACKET).clamp(min=-1)  # P(X <= low) < u
    high = guess.clamp(min=0) + _POISSON_BRACKET  # P(X <= high) >= u
    for _ in range((2 * _POISSON_BRACKET + 1).bit_length()):
        middle = ((low + high) / 2).floor()
        reached = torch.special.gammaincc(middle.clamp(min=0) + 1, rate) >= u
        reached &= middle >= 0
        high = torch.where(reached, middle, high)
        low = torch.where(reached, low, middle)
    return torch.where(rate > 0, high, 0)


def binomial_quantile(u: Tensor, total_count: Tensor, probs: Tensor) -> Tensor:
    """Quantile function of Binomial(total_count, probs): the smallest k with P(X <= k) >= u.

    The probability mass is summed over a window of twelve standard deviations on either side of the mode, by the
    ratios of neighbouring masses. Cost: O(sqrt(max(total_count))) per element.

    Args:
        u: probabilities in [0, 1), any shape.
        total_count: non-negative integers, broadcastable with ``u``.
        probs: in [0, 1], broadcastable with ``u``.

    Returns:
        float64 tensor of the broadcast shape with integer values.
    """
    u, n, p = torch.broadcast_tensors(_open_unit(u), total_count.double(), probs.double())
    odds = p.clamp(1e-300, 1 - 2.0**-53)
    odds = odds / (1 - odds)
    if n.numel() == 0:
        return n.clone()
    n_max = guards.number(n.max(), "the largest number of trials of a binomial")
    half = int(min(n_max, 6 * n_max**0.5 + 40)) + 1
    mode = torch.minimum(((n + 1) * p).floor(), n)
    offset = torch.arange(half, dtype=u.dtype, device=u.device)
    k = mode.unsqueeze(-1) + offset  # masses above the mode, relative to the mode's: a product of ratios below 1
    above = ((n.unsqueeze(-1) - k) / (k + 1) * odds.unsqueeze(-1)).clamp(min=0).cumprod(-1)
    k = mode.unsqueeze(-1) - offset  # likewise below it
    below = (k / (n.unsqueeze(-1) - k + 1) / odds.unsqueeze(-1)).clamp(min=0).cumprod(-1)
    mass = torch.cat([below.flip(-1), torch.ones_like(u).unsqueeze(-1), above], -1)
    cdf = mass.cumsum(-1)
    # A total that only rounding puts below the threshold must not leave the window: the comparison is strict and clamped.
    rank = (cdf < u.unsqueeze(-1) * cdf[..., -1:]).sum(-1)
    value = (mode - half + rank).clamp(min=0)
    return torch.where(p <= 0, 0, torch.where(p >= 1, n, torch.minimum(value, n)))
