r"""KL divergences in closed form between laws of different families.

.. math:: KL(p \,\|\, q) = E_p[\ln p] - E_p[\ln q]

The second term needs a few expectations under p, such as its mean and :math:`E_p[\ln x]`. :class:`Expectations` holds those that are
known for a family, in float64, and :data:`_COSTS` has the densities that are functions of them. If p reaches outside the support of
q, the KL is infinite.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from pyro_kd.divergences.special import (
    beta_negentropy,
    gamma_negentropy,
    log_sinhc,
    safe_log,
    safe_log1m,
    weighted_log_ratio,
)

__all__ = ["continuous_logit", "cross_kl"]

_EULER = 0.57721566490153286061
_Bound = Tensor | float


@dataclass(frozen=True)
class Expectations:
    """The expectations of a law that are known in closed form. None: not known. All tensors have shape ``batch_shape``.

    Attributes:
        negentropy: :math:`E[\\ln p]`.
        mean: of the law.
        variance: of the law.
        low, high: the ends of its support.
        log: :math:`E[\\ln x]`.
        log1m: :math:`E[\\ln (1 - x)]`.
        log_laplace: the function :math:`t \\mapsto \\ln E[\\exp(-t x)]`.
        distance: the function :math:`m \\mapsto E|x - m|`.
    """

    negentropy: Tensor
    mean: Tensor
    variance: Tensor
    low: _Bound = -math.inf
    high: _Bound = math.inf
    log: Tensor | None = None
    log1m: Tensor | None = None
    log_laplace: Callable[[Tensor], Tensor] | None = None
    distance: Callable[[Tensor], Tensor] | None = None


def cross_kl(p: Any, q: Any) -> Tensor | None:
    """KL(p || q) of shape ``batch_shape``, of two laws over numbers or counts; None if there is no closed form."""
    if isinstance(p, td.Bernoulli) and isinstance(q, td.Poisson):
        return _bernoulli_poisson(p, q)
    expect = next((make for family, make in _EXPECTATIONS.items() if isinstance(p, family)), None)
    cost = next((make for family, make in _COSTS.items() if isinstance(q, family)), None)
    if expect is None or cost is None:
        return None
    known = expect(p)
    low, high = _bounds(q)
    value = cost(q, known)
    if value is None:
        if not _reaches_outside(known, low, high):
            return None
        value = torch.full_like(known.mean - _parameter(q), torch.inf)
    device = value.device
    inside = torch.as_tensor(known.low >= low, device=device) & torch.as_tensor(known.high <= high, device=device)
    dtype = torch.promote_types(*(_parameter(fn).dtype for fn in (p, q)))
    return torch.where(inside, known.negentropy + value, torch.inf).to(dtype)


def _reaches_outside(p: Expectations, low: _Bound, high: _Bound) -> bool:
    """Whether p reaches outside of a support, whatever its parameters. A bound that is a parameter is above 0."""
    below = isinstance(p.low, float) and (isinstance(low, Tensor) or p.low < low)
    return below or (isinstance(p.high, float) and isinstance(high, float) and p.high > high)


def continuous_logit(fn: Any) -> Tensor:
    """The natural parameter of a ContinuousBernoulli, of shape ``batch_shape``, from the parameter that was given."""
    if fn._param is vars(fn).get("logits"):
        return fn.logits.double()
    probs = fn.probs.double()
    return probs.log() - torch.log1p(-probs)


def _parameter(fn: Any) -> Tensor:
    """One of the parameters, for its dtype."""
    return getattr(fn, next(name for name in fn.arg_constraints if isinstance(getattr(fn, name, None), Tensor)))


def _doubles(fn: Any, *names: str) -> list[Tensor]:
    return [getattr(fn, name).double() for name in names]


def _bernoulli_poisson(p: Any, q: Any) -> Tensor:
    probs, rate = p.probs.double(), q.rate.double()
    ones = weighted_log_ratio(probs, safe_log(probs), safe_log(rate))
    value = ones + weighted_log_ratio(1 - probs, safe_log1m(probs), torch.zeros_like(probs)) + rate
    return value.to(torch.promote_types(p._param.dtype, q.rate.dtype))


# Expectations under p.


def _of_exponential(p: Any) -> Expectations:
    (rate,) = _doubles(p, "rate")
    return Expectations(
        rate.log() - 1,
        1 / rate,
        rate**-2,
        low=0.0,
        log=-_EULER - rate.log(),
        log_laplace=lambda t: -torch.log1p(t / rate),
    )


def _of_gamma(p: Any) -> Expectations:
    conc, rate = _doubles(p, "concentration", "rate")
    return Expectations(
        gamma_negentropy(conc) + rate.log(),
        conc / rate,
        conc / rate / rate,
        low=0.0,
        log=torch.digamma(conc) - rate.log(),
        log_laplace=lambda t: -conc * torch.log1p(t / rate),
    )


def _of_beta(p: Any) -> Expectations:
    a, b = _doubles(p, "concentration1", "concentration0")
    total = a + b
    mean = a / total
    return Expectations(
        beta_negentropy(a, b),
        mean,
        mean * (b / total) / (total + 1),
        low=0.0,
        high=1.0,
        log=torch.digamma(a) - torch.digamma(total),
        log1m=torch.digamma(b) - torch.digamma(total),
    )


def _of_continuous_bernoulli(p: Any) -> Expectations:
    logit = continuous_logit(p)
    log_norm, slope, curvature = log_sinhc(logit)
    return Expectations(logit * slope - log_norm, 0.5 + slope, curvature, low=0.0, high=1.0)


def _of_gumbel(p: Any) -> Expectations:
    loc, scale = _doubles(p, "loc", "scale")
    return Expectations(-scale.log() - _EULER - 1, loc + _EULER * scale, (math.pi * scale).square() / 6)


def _of_laplace(p: Any) -> Expectations:
    loc, scale = _doubles(p, "loc", "scale")
    return Expectations(-1 - math.log(2) - scale.log(), loc, 2 * scale.square())


def _of_normal(p: Any) -> Expectations:
    loc, scale = _doubles(p, "loc", "scale")

    def distance(center: Tensor) -> Tensor:
        z = (loc - center) / scale / math.sqrt(2)
        return scale * math.sqrt(2) * ((-z.square()).exp() / math.sqrt(math.pi) + z * torch.erf(z))

    return Expectations(
        -scale.log() - 0.5 * math.log(2 * math.pi * math.e),
        loc,
        scale.square(),
        log_laplace=lambda t: -t * loc + 0.5 * (t * scale).square(),
        distance=distance,
    )


def _of_pareto(p: Any) -> Expectations:
    scale, alpha = _doubles(p, "scale", "alpha")
    one, two = (torch.where(alpha > k, alpha, k + 1) for k in (1, 2))
    return Expectations(
        alpha.log() - scale.log() - 1 / alpha - 1,
        torch.where(alpha > 1, scale * one / (one - 1), torch.inf),
        torch.where(alpha > 2, (scale / (two - 1)).square() * two / (two - 2), torch.inf),
        low=scale,
        log=scale.log() + 1 / alpha,
    )


def _of_uniform(p: Any) -> Expectations:
    low, high = _doubles(p, "low", "high")
    width = high - low

    def log_laplace(t: Tensor) -> Tensor:
        return -t * low + (-torch.expm1(-t * width)).log() - (t * width).log()

    return Expectations(
        -width.log(),
        low + width / 2,
        width.square() / 12,
        low=low,
        high=high,
        log=_mean_log(low, high),
        log1m=_mean_log(1 - high, 1 - low),
        log_laplace=log_laplace,
    )


def _mean_log(low: Tensor, high: Tensor) -> Tensor:
    """The mean of the logarithm over an interval of positive numbers; an arbitrary number for other intervals."""
    first, last = torch.where(low > 0, low, 1), torch.where(high > 0, high, 1)
    width = torch.where(last > first, (last - first) / first, 1)
    return last.log() - 1 + torch.where(low > 0, width.log1p() / width, 0)


_EXPECTATIONS: dict[type, Callable[[Any], Expectations]] = {
    td.Exponential: _of_exponential,
    td.Gamma: _of_gamma,
    td.Beta: _of_beta,
    td.ContinuousBernoulli: _of_continuous_bernoulli,
    td.Gumbel: _of_gumbel,
    td.Laplace: _of_laplace,
    td.Normal: _of_normal,
    td.Pareto: _of_pareto,
    td.Uniform: _of_uniform,
}


# The cost of q: -E_p[ln q].


def _to_normal(q: Any, p: Expectations) -> Tensor:
    loc, scale = _doubles(q, "loc", "scale")
    moved = torch.where(p.mean.isfinite(), p.mean, 0) - loc
    return 0.5 * math.log(2 * math.pi) + scale.log() + (p.variance / scale / scale + (moved / scale).square()) / 2


def _to_exponential(q: Any, p: Expectations) -> Tensor:
    (rate,) = _doubles(q, "rate")
    return rate * p.mean - rate.log()


def _to_gamma(q: Any, p: Expectations) -> Tensor | None:
    conc, rate = _doubles(q, "concentration", "rate")
    if p.log is None:
        return None
    return torch.lgamma(conc) - conc * rate.log() - (conc - 1) * p.log + rate * p.mean


def _to_gumbel(q: Any, p: Expectations) -> Tensor | None:
    loc, scale = _doubles(q, "loc", "scale")
    if p.log_laplace is None:
        return None
    return scale.log() + (p.mean - loc) / scale + (loc / scale + p.log_laplace(1 / scale)).exp()


def _to_laplace(q: Any, p: Expectations) -> Tensor | None:
    loc, scale = _doubles(q, "loc", "scale")
    return None if p.distance is None else math.log(2) + scale.log() + p.distance(loc) / scale


def _to_uniform(q: Any, p: Expectations) -> Tensor:
    low, high = _doubles(q, "low", "high")
    return (high - low).log()


def _to_continuous_bernoulli(q: Any, p: Expectations) -> Tensor:
    logit = continuous_logit(q)
    return log_sinhc(logit)[0] - logit * (p.mean - 0.5)


def _to_beta(q: Any, p: Expectations) -> Tensor | None:
    a, b = _doubles(q, "concentration1", "concentration0")
    if p.log is None or p.log1m is None:
        return None
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b) - (a - 1) * p.log - (b - 1) * p.log1m


def _to_pareto(q: Any, p: Expectations) -> Tensor | None:
    scale, alpha = _doubles(q, "scale", "alpha")
    return None if p.log is None else p.log - alpha.log() + alpha * (p.log - scale.log())


_COSTS: dict[type, Callable[[Any, Expectations], Tensor | None]] = {
    td.Normal: _to_normal,
    td.Exponential: _to_exponential,
    td.Gamma: _to_gamma,
    td.Gumbel: _to_gumbel,
    td.Laplace: _to_laplace,
    td.Uniform: _to_uniform,
    td.ContinuousBernoulli: _to_continuous_bernoulli,
    td.Beta: _to_beta,
    td.Pareto: _to_pareto,
}


def _bounds(q: Any) -> tuple[_Bound, _Bound]:
    """The ends of the support of q."""
    if isinstance(q, td.Uniform):
        return q.low.double(), q.high.double()
    if isinstance(q, td.Pareto):
        return q.scale.double(), math.inf
    if isinstance(q, td.Beta | td.ContinuousBernoulli):
        return 0.0, 1.0
    return (0.0 if isinstance(q, td.Exponential | td.Gamma) else -math.inf), math.inf
