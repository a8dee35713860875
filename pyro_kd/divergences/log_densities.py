"""The log densities of two laws at a draw from the first, for the estimate of a divergence.

They are the ``log_prob`` of the laws, with three exceptions. If both laws end in the same map, it cancels and is removed: this needs
no Jacobian and no inverse of a rounded value. If they end in different maps, both invert the same value, so that equal laws give
equal densities. And the formulas of some families lose the density near the border of the support.
"""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch import distributions as td
from torch.distributions import Independent, TransformedDistribution
from torch.distributions.transforms import ExpTransform, SigmoidTransform
from torch.nn.functional import softplus

from pyro_kd.divergences.closed_forms import binary, is_same_map
from pyro_kd.noise.borders import log_height, log_height_of, log_of, preimage, share_at_border, with_log, with_log_height
from pyro_kd.noise.point_masses import is_discrete
from pyro_kd.noise.samplers import unwrapped

__all__ = ["log_densities", "log_density", "share_rounded"]


def log_densities(p: Any, q: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """Log p and log q at a draw from p, up to a common term.

    Args:
        p: the law that the value was drawn from. The value carries the steps of the draw.
        q: the other law.
        value: the draw, of shape ``batch_shape + event_shape``.

    Returns:
        Two tensors of shape ``batch_shape``.
    """
    if (
        isinstance(p, Independent)
        and isinstance(q, Independent)
        and p.reinterpreted_batch_ndims == q.reinterpreted_batch_ndims
    ):
        inner = log_densities(p.base_dist, q.base_dist, value)
        first, second = (sum_rightmost(log, p.reinterpreted_batch_ndims) for log in inner)
        return first, second
    value = getattr(value, "_unquantize", value)  # straight-through draws: their density is that of the relaxed value
    if not _is_chain(p) or not _is_chain(q):
        return _log_prob(p, value), log_density(q, value, drawn_from=p)
    before = _before_last(p, q, value)
    if before is not None:
        return log_densities(*before)
    other = log_density(q, value, drawn_from=p)
    try:
        return log_density(p, value), other
    except (KeyError, NotImplementedError):  # a flow without inverse
        return _log_prob(p, value), other


def log_density(fn: Any, value: Tensor, drawn_from: Any = None) -> Tensor:
    """The log density of a law at a value, of shape ``batch_shape``.

    Args:
        fn: the law.
        value: of shape ``batch_shape + event_shape``.
        drawn_from: the law that the value was drawn from. If it ends in an exponential or a sigmoid, the value before that map
            gives the logarithm of the value in full accuracy.
    """
    value = getattr(value, "_unquantize", value)
    alias = value.view_as(value)  # carries no steps of the other law, and is not a tensor whose inverse a cache may hold
    log = log_of(value)
    if log is None and _ends_in(drawn_from, ExpTransform):
        log = preimage(value)
    height = log_height(value)
    if height is None and _ends_in(drawn_from, SigmoidTransform):
        before = preimage(value)
        height = None if before is None else _log_height_of_logit(before)
    if height is not None:
        return _log_prob(fn, with_log_height(alias, height))
    return _log_prob(fn, alias if log is None else with_log(alias, log))


def share_rounded(p: Any, q: Any, value: Tensor) -> float:
    """The share of numbers in a draw from p that were rounded to the border of the support, so that q gives a wrong density."""
    p, q = unwrapped(p), unwrapped(q)
    value = getattr(value, "_unquantize", value)
    if _is_chain(p) and _is_chain(q) and is_same_map(p.transforms[-1], q.transforms[-1]):
        return 0.0
    is_asked_for = isinstance(q, td.Beta | td.Kumaraswamy) or _ends_in(q, ExpTransform | SigmoidTransform)
    if is_asked_for and (log_of(value) is not None or _ends_in(p, ExpTransform | SigmoidTransform)):
        return 0.0
    return share_at_border(value, p)


def _ends_in(fn: Any, family: Any) -> bool:
    return _is_chain(fn) and isinstance(fn.transforms[-1], family)


def _before_last(p: Any, q: Any, value: Tensor) -> tuple[Any, Any, Tensor] | None:
    """Both laws and the draw without the last transform if that is the same for both; else None."""
    if p.event_shape != q.event_shape:
        return None
    transform = p.transforms[-1]
    if not is_same_map(transform, q.transforms[-1]):
        return None
    first, second = (_without_last(fn) for fn in (p, q))
    if first.batch_shape != p.batch_shape or second.batch_shape != q.batch_shape:
        return None
    return first, second, _inverse(transform, value)


def _without_last(fn: Any) -> Any:
    rest = fn.transforms[:-1]
    return TransformedDistribution(fn.base_dist, rest, validate_args=False) if rest else fn.base_dist


def _inverse(transform: Any, value: Tensor) -> Tensor:
    before = _given_to(transform, value)
    return transform.inv(value) if before is None else before


def _given_to(transform: Any, value: Tensor) -> Tensor | None:
    """The input with which a transform makes the value before it was rounded; None if that is not known."""
    before = preimage(value)
    if before is None and isinstance(transform, ExpTransform):
        before = log_of(value)
    if before is None and isinstance(transform, SigmoidTransform) and log_height(value) is not None:
        log, height = _log_and_height(value)
        before = log - _log1m(height)
    return before


def _log_prob(fn: Any, value: Tensor) -> Tensor:
    """The log density of a law at a value; at the unrounded value if there is one that the law can use."""
    if isinstance(fn, Independent):
        return sum_rightmost(_log_prob(fn.base_dist, value), fn.reinterpreted_batch_ndims)
    if isinstance(fn, td.Kumaraswamy):
        log_x, height = _log_and_height(value)
        a, b = fn.concentration1, fn.concentration0
        return a.log() + b.log() + (a - 1) * log_x + (b - 1) * _log1m(height + a.log())
    if isinstance(fn, td.Beta) and log_of(value) is not None:
        log_x, height = _log_and_height(value)
        a, b = fn.concentration1, fn.concentration0
        return (a - 1) * log_x + (b - 1) * _log1m(height) + torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    if type(fn) is td.relaxed_bernoulli.LogitRelaxedBernoulli:
        moved = fn.logits - value * fn.temperature  # whose exponential torch takes
        return fn.temperature.log() + moved - 2 * softplus(moved)
    if isinstance(fn, dist.ZeroInflatedDistribution):
        return _log_prob_of_zero_inflated(fn, value)
    if _is_chain(fn):
        return _log_prob_of_image(fn, value)
    log_prob: Tensor = fn.log_prob(value)
    return log_prob


def _log_prob_of_zero_inflated(fn: Any, value: Tensor) -> Tensor:
    """By the gate as it was given: after a draw, Pyro's own formula uses a rounded probability."""
    is_zero = value == 0
    _, _, log_zero, log_rest = binary(fn, "gate", "gate_logits")
    if is_discrete(fn.base_dist):
        if fn._validate_args:
            fn._validate_sample(value)
        rest = log_rest + _log_prob(fn.base_dist, value)
        return torch.where(is_zero, torch.logaddexp(log_zero, rest), rest)
    # At 0 the density is nothing next to the point mass.
    rest = log_rest + _log_prob(fn.base_dist, torch.where(is_zero, 1, value))
    return torch.where(is_zero, log_zero, rest)


def _is_chain(fn: Any) -> bool:
    """Whether the density of a law is computed by its chain of transforms, and not by a formula of its own."""
    if not isinstance(fn, TransformedDistribution) or isinstance(fn, td.Kumaraswamy):
        return False
    return bool(fn.transforms) and type(fn).log_prob in _CHAIN_RULE


_CHAIN_RULE: set[Any] = {
    TransformedDistribution.log_prob,
    dist.RelaxedOneHotCategoricalStraightThrough.log_prob,
    dist.RelaxedBernoulliStraightThrough.log_prob,
}


def _log_prob_of_image(fn: Any, value: Tensor) -> Tensor:
    """By the inputs of all transforms; by ``log_prob`` if the value does not carry them."""
    chain = [value]
    for transform in reversed(fn.transforms):
        before = _given_to(transform, chain[-1])
        if before is None:
            log_prob: Tensor = fn.log_prob(value)
            return log_prob
        chain.append(before)
    total: Any = 0.0
    event_dim = len(fn.event_shape)
    for transform, y, x in zip(reversed(fn.transforms), chain, chain[1:], strict=False):
        event_dim += transform.domain.event_dim - transform.codomain.event_dim
        total = total - sum_rightmost(transform.log_abs_det_jacobian(x, y), event_dim - transform.domain.event_dim)
    return total + sum_rightmost(_log_prob(fn.base_dist, chain[-1]), event_dim - len(fn.base_dist.event_shape))


def _log_and_height(value: Tensor) -> tuple[Tensor, Tensor]:
    """Log x and log(-log x) of a value in (0, 1)."""
    finfo = torch.finfo(value.dtype)
    log, height = log_of(value), log_height(value)
    if log is None:
        log = value.clamp(finfo.tiny, 1 - finfo.eps / 2).log()
    return log, (-log).clamp(min=finfo.tiny).log() if height is None else height


def _log_height_of_logit(logit: Tensor) -> Tensor:
    near_0, near_1 = logit.clamp(max=0), logit.clamp(min=0)
    return torch.where(logit < 0, softplus(-near_0).log(), log_height_of(-softplus(near_1)))


def _log1m(height: Tensor) -> Tensor:
    """Log(1 - x) from log(-log x)."""
    is_near_1 = height < -10
    near_0 = torch.where(is_near_1, 0.0, height)
    return torch.where(is_near_1, height - height.exp() / 2, (-torch.expm1(-near_0.exp())).log())
