r"""KL divergences in closed form, accurate up to the ends of the parameters.

Torch's registry has most of these formulas, and evaluates them as they are in the literature. In float32 they lose all digits
if large terms cancel (concentrations and rates above a thousand, small probabilities), and are NaN or infinite if a parameter is at
an end of its range. The formulas here compute in float64, avoid cancellation (:mod:`pyro_kd.divergences.special`), and return the
parameters' dtype. The most common families, Normal, Bernoulli and Categorical, have formulas that are accurate in their own dtype.

All formulas are torch functions without branches on values, so that they can be captured. What users register with
``torch.distributions.register_kl`` has priority. This file has the pairs of one family;
:mod:`pyro_kd.divergences.cross_forms` has pairs of different families, and :mod:`pyro_kd.divergences.gaussian_forms` Gaussians over
vectors. The file is long because it is a table of formulas.
"""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch import distributions as td
from torch.distributions import Independent, TransformedDistribution, kl_divergence
from torch.nn.functional import softplus

from pyro_kd.divergences.cross_forms import continuous_logit, cross_kl
from pyro_kd.divergences.gaussian_forms import gaussian_kl
from pyro_kd.divergences.special import (
    common_dtype,
    lgamma_divergence,
    log_sinhc,
    relative_excess,
    safe_log,
    safe_log1m,
    weighted_log_ratio,
)
from pyro_kd.utils import guards
from pyro_kd.utils.tensors import tensors_in
from pyro_kd.utils.torch_internals import KL_MEMOIZE, KL_REGISTRY, dispatch_kl

__all__ = ["binary", "closed_form_kl", "is_same_map"]

Form = Callable[[Any, Any], Tensor | None]

_FORMS: dict[type, Form] = {}
"""Family -> the KL between two of it. The first family that both distributions are instances of counts."""

_EULER = 0.57721566490153286061


def closed_form_kl(p: Any, q: Any) -> Tensor | None:
    """KL(p || q) of shape ``batch_shape``; None if there is no closed form, or none that is accurate."""
    if _has_law_of_its_own(type(p)) or _has_law_of_its_own(type(q)):
        return None
    if _is_registered_by_user(type(p), type(q)):
        return kl_divergence(p, q)
    if isinstance(p, Independent) and isinstance(q, Independent):
        return _independent(p, q)
    if isinstance(p, dist.MaskedDistribution) and isinstance(q, dist.MaskedDistribution):
        inner = closed_form_kl(p.base_dist, q.base_dist)
        mask = p._mask if p._mask is q._mask else p._mask & q._mask
        return None if inner is None else torch.where(torch.as_tensor(mask, device=inner.device), inner, 0)
    if isinstance(p, dist.ZeroInflatedDistribution) and isinstance(q, dist.ZeroInflatedDistribution):
        return _zero_inflated(p, q)
    for family, form in _FORMS.items():
        if isinstance(p, family) and isinstance(q, family):
            return form(p, q)
    for other_form in (gaussian_kl, cross_kl, _between_images):
        value = other_form(p, q)
        if value is not None:
            return value
    return None


# Which pairs have a closed form.


def _has_law_of_its_own(family: type) -> bool:
    """Whether a user's class defines its own density, so that the formulas for its base class do not hold for it."""
    for base in family.__mro__:
        if base.__module__.startswith(("torch.", "pyro.")):
            return False
        if "log_prob" in vars(base):
            return not any(family in pair for pair in KL_REGISTRY)
    return False


def _is_registered_by_user(p: type, q: type) -> bool:
    """Whether torch's registry has a function for the pair that comes from neither torch nor Pyro."""
    if (p, q) not in KL_MEMOIZE:
        KL_MEMOIZE[p, q] = dispatch_kl(p, q)  # as kl_divergence does
    form = KL_MEMOIZE[p, q]
    return form is not NotImplemented and not form.__module__.startswith(("torch.", "pyro."))


def _between_images(p: Any, q: Any) -> Tensor | None:
    """The KL between two laws under the same one-to-one maps without gradients: that between the laws before the maps."""
    if not isinstance(p, TransformedDistribution) or not isinstance(q, TransformedDistribution):
        return None
    if p.event_shape != q.event_shape or len(p.transforms) != len(q.transforms):
        return None
    pairs = list(zip(p.transforms, q.transforms, strict=True))
    return closed_form_kl(p.base_dist, q.base_dist) if all(is_same_map(*pair) for pair in pairs) else None


def is_same_map(first: Any, second: Any) -> bool:
    """Whether two transforms are the same one-to-one map, apart from their caches, and have nothing to train."""
    return (
        first.bijective
        and second.bijective
        and not _needs_gradient(first)
        and not _needs_gradient(second)
        and first == second
    )


def _needs_gradient(transform: Any) -> bool:
    """Whether a transform has parameters that require a gradient. The cache of its last call does not count."""
    return any(tensor.requires_grad for tensor in tensors_in(_without_cache(transform)))


def _without_cache(value: Any) -> Any:
    """The attributes of a transform and of the transforms inside it, without their caches."""
    found, stack, seen = [], [value], set[int]()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.nn.Module):
            found.append(item)
        elif isinstance(item, td.Transform):
            stack += [attribute for name, attribute in vars(item).items() if "cache" not in name]
        elif isinstance(item, list | tuple):
            stack += item
        else:
            found.append(item)
    return found


def _independent(p: Any, q: Any) -> Tensor | None:
    ranks = p.reinterpreted_batch_ndims, q.reinterpreted_batch_ndims
    shared = min(ranks)
    inner = [
        Independent(fn.base_dist, rank - shared) if rank > shared else fn.base_dist
        for fn, rank in zip((p, q), ranks, strict=True)
    ]
    value = closed_form_kl(*inner)
    return None if value is None else sum_rightmost(value, shared)


def _zero_inflated(p: Any, q: Any) -> Tensor | None:
    """The point mass at 0, and the rest, which has no mass there if it is continuous."""
    if p.base_dist.support.is_discrete or q.base_dist.support.is_discrete:
        return None
    rest = closed_form_kl(p.base_dist, q.base_dist)
    if rest is None:
        return None
    gates = [binary(fn, "gate", "gate_logits") for fn in (p, q)]
    share = gates[0][1]
    return _binary_kl(*gates) + torch.where(share > 0, share * rest, 0)


# The forms. Each gets the named parameters, of p and then of q, in float64.


def _form(family: type, *names: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def form(p: Any, q: Any) -> Tensor | None:
            parameters = [getattr(fn, name) for fn in (p, q) for name in names]
            value = formula(*[parameter.double() for parameter in parameters])
            return value.to(common_dtype(*parameters))

        _FORMS[family] = form
        return formula

    return register


def _own_form(family: type) -> Callable[[Form], Form]:
    def register(form: Form) -> Form:
        _FORMS[family] = form
        return form

    return register


@_own_form(td.Normal)
def _normal(p: Any, q: Any) -> Tensor:
    ratio, moved = p.scale / q.scale, (p.loc - q.loc) / q.scale
    return 0.5 * (ratio * ratio - 1 + moved * moved) - ratio.log()


@_own_form(td.HalfNormal)
def _half_normal(p: Any, q: Any) -> Tensor | None:
    return _normal(p.base_dist, q.base_dist)


# Laws over two values: probabilities and their logarithms, of 1 and of 0.


def binary(
    fn: Any, probs: str = "probs", logits: str = "logits", dtype: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P(1), P(0) and their logarithms, of the parameters' shape, from the parameter that was given, in full accuracy."""
    if _was_given(fn, probs, logits) == probs:
        value = vars(fn)[probs] if dtype is None else vars(fn)[probs].to(dtype)
        return value, 1 - value, safe_log(value), safe_log1m(value)
    value = getattr(fn, logits) if dtype is None else getattr(fn, logits).to(dtype)
    return value.sigmoid(), (-value).sigmoid(), -softplus(-value), -softplus(value)


def _was_given(fn: Any, probs: str = "probs", logits: str = "logits") -> str:
    """The name of the parameter that was given. Once computed, the other one is stored beside it."""
    held = vars(fn)
    if "_param" in held:
        return probs if held["_param"] is held.get(probs) else logits
    return next(name for name in held if name in (probs, logits))


def _binary_kl(p: tuple[Tensor, ...], q: tuple[Tensor, ...]) -> Tensor:
    (p1, p0, log_p1, log_p0), (_, _, log_q1, log_q0) = p, q
    return weighted_log_ratio(p1, log_p1, log_q1) + weighted_log_ratio(p0, log_p0, log_q0)


@_own_form(td.Bernoulli)
def _bernoulli(p: Any, q: Any) -> Tensor:
    if all(fn._param is vars(fn).get("logits") for fn in (p, q)):
        return _bernoulli_kl_of_logits(p.logits, q.logits)
    return _binary_kl(binary(p), binary(q))


def _bernoulli_kl_of_logits(p: Tensor, q: Tensor) -> Tensor:
    """The same with fewer operations. If 1 is likely, 0 and 1 change places, so that terms are small if p and q are close."""
    sign = torch.where(p > 0, -1.0, 1.0).to(p.dtype)  # without a derivative, which |p| has not at 0
    a, b = sign * p, sign * q
    probs = a.sigmoid()
    is_finite = (probs > 0) & (b < torch.inf)  # where b is infinite, so is its softplus
    return torch.where(is_finite, a - b, 0).mul_(probs).add_(softplus(b)).sub_(softplus(a))


@_own_form(td.Binomial)
def _binomial(p: Any, q: Any) -> Tensor | None:
    if not guards.holds(p.total_count >= q.total_count, "the teacher has at least as many trials"):
        return None  # it has binomial coefficients, which do not cancel
    ours, theirs = binary(p, dtype=torch.float64), binary(q, dtype=torch.float64)
    equal = p.total_count * _binary_kl(ours, theirs)
    never = torch.where(ours[0] > 0, torch.inf, -q.total_count * theirs[3])  # more trials than the student's
    value = torch.where(p.total_count > q.total_count, never, equal)
    return value.to(common_dtype(p._param, q._param))


@_own_form(td.Geometric)
def _geometric(p: Any, q: Any) -> Tensor:
    (p1, p0, log_p1, log_p0), (_, _, log_q1, log_q0) = (binary(fn, dtype=torch.float64) for fn in (p, q))
    failures = weighted_log_ratio(p0, log_p0, log_q0) / p1
    parameters = [vars(fn)[_was_given(fn)] for fn in (p, q)]
    return (log_p1 - log_q1 + failures).to(common_dtype(*parameters))


@_own_form(td.OneHotCategorical)
def _one_hot_categorical(p: Any, q: Any) -> Tensor | None:
    return _categorical(p._categorical, q._categorical)


@_own_form(td.Categorical)
def _categorical(p: Any, q: Any) -> Tensor | None:
    if p._num_events != q._num_events:
        return None
    log_p, log_q = (safe_log(fn.probs) if fn._param is vars(fn).get("probs") else fn.logits for fn in (p, q))
    return weighted_log_ratio(p.probs, log_p, log_q).sum(-1)


@_form(td.Poisson, "rate")
def _poisson(p: Tensor, q: Tensor) -> Tensor:
    excess = relative_excess(p, torch.where(q > 0, q, 1))
    return torch.where(p > 0, torch.where(q > 0, excess, torch.inf), q)


# Continuous laws.


@_form(td.Exponential, "rate")
def _exponential(p: Tensor, q: Tensor) -> Tensor:
    return relative_excess(p, q) / p


@_form(td.Gamma, "concentration", "rate")
def _gamma(a: Tensor, rate_p: Tensor, b: Tensor, rate_q: Tensor) -> Tensor:
    return lgamma_divergence(a, b) + a * relative_excess(rate_p, rate_q) / rate_p + (a - b) * (rate_q.log() - rate_p.log())


@_form(td.Beta, "concentration1", "concentration0")
def _beta(a1: Tensor, a0: Tensor, b1: Tensor, b0: Tensor) -> Tensor:
    return lgamma_divergence(a1, b1) + lgamma_divergence(a0, b0) - lgamma_divergence(a1 + a0, b1 + b0)


@_form(td.Dirichlet, "concentration")
def _dirichlet(a: Tensor, b: Tensor) -> Tensor:
    return lgamma_divergence(a, b).sum(-1) - lgamma_divergence(a.sum(-1), b.sum(-1))


@_own_form(td.ContinuousBernoulli)
def _continuous_bernoulli(p: Any, q: Any) -> Tensor:
    first, second = continuous_logit(p), continuous_logit(q)
    (norm_p, slope, _), (norm_q, _, _) = log_sinhc(first), log_sinhc(second)
    return (norm_q - norm_p - (second - first) * slope).to(common_dtype(p._param, q._param))


@_form(td.Uniform, "low", "high")
def _uniform(low_p: Tensor, high_p: Tensor, low_q: Tensor, high_q: Tensor) -> Tensor:
    wider = torch.log((high_q - low_q) / (high_p - low_p))
    return torch.where((low_q <= low_p) & (high_p <= high_q), wider, torch.inf)


@_form(td.Laplace, "loc", "scale")
def _laplace(loc_p: Tensor, scale_p: Tensor, loc_q: Tensor, scale_q: Tensor) -> Tensor:
    distance = (loc_p - loc_q).abs()
    spread = scale_p * (-distance / scale_p).exp()
    return (scale_q / scale_p).log() + (distance + spread) / scale_q - 1


@_form(td.Cauchy, "loc", "scale")
def _cauchy(loc_p: Tensor, scale_p: Tensor, loc_q: Tensor, scale_q: Tensor) -> Tensor:
    """Chyzak and Nielsen, arXiv:1905.10965."""
    wider, moved = scale_p - scale_q, loc_p - loc_q
    return torch.log1p((wider / scale_p * (wider / scale_q) + moved / scale_p * (moved / scale_q)) / 4)


@_own_form(td.HalfCauchy)
def _half_cauchy(p: Any, q: Any) -> Tensor | None:
    return closed_form_kl(p.base_dist, q.base_dist)


@_form(td.Gumbel, "loc", "scale")
def _gumbel(loc_p: Tensor, scale_p: Tensor, loc_q: Tensor, scale_q: Tensor) -> Tensor:
    ratio, moved = scale_p / scale_q, (loc_p - loc_q) / scale_q
    return -ratio.log() + _EULER * (ratio - 1) + moved + torch.expm1(torch.lgamma(1 + ratio) - moved)


@_form(td.Weibull, "concentration", "scale")
def _weibull(shape_p: Tensor, scale_p: Tensor, shape_q: Tensor, scale_q: Tensor) -> Tensor:
    """As for Gumbels, the laws of the negative logarithms: of scale 1 / shape, at -log scale."""
    return _gumbel(-scale_p.log(), 1 / shape_p, -scale_q.log(), 1 / shape_q)


@_form(td.Pareto, "scale", "alpha")
def _pareto(scale_p: Tensor, alpha_p: Tensor, scale_q: Tensor, alpha_q: Tensor) -> Tensor:
    value = relative_excess(alpha_p, alpha_q) / alpha_p + alpha_q * (scale_p / scale_q).log()
    return torch.where(scale_p >= scale_q, value, torch.inf)


@_form(td.VonMises, "loc", "concentration")
def _von_mises(loc_p: Tensor, conc_p: Tensor, loc_q: Tensor, conc_q: Tensor) -> Tensor:
    resultant = torch.special.i1e(conc_p) / torch.special.i0e(conc_p)
    away = 1 - resultant * (loc_p - loc_q).cos()
    log_norm = torch.special.i0e(conc_q).log() - torch.special.i0e(conc_p).log()
    return log_norm + conc_q * away - conc_p * (1 - resultant)
