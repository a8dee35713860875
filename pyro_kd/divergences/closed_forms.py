r"""KL divergences in closed form, right to the ends of the parameters.

Torch's registry has most of these formulas, and evaluates them as they stand in the literature: in float32 they lose all digits
where large terms cancel (concentrations and rates of a thousand and more, small probabilities), and are NaN or infinite where a
parameter sits at an end of its range. Those here compute in float64, with cancellation taken apart by hand
(:mod:`pyro_kd.divergences.special`), and return the parameters' dtype. Normal, Bernoulli and Categorical, of which models are
full, have forms that are right in their own.

Everything is a torch function without a branch on values, so that it can be captured. What users register with
``torch.distributions.register_kl`` comes first. Two of one family stand here, two of different
ones in :mod:`pyro_kd.divergences.cross_forms`.
"""

import functools
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch import distributions as td
from torch.distributions import Independent, TransformedDistribution, kl, kl_divergence
from torch.nn.functional import softplus

from pyro_kd.divergences.cross_forms import continuous_logit, cross_kl
from pyro_kd.divergences.special import lgamma_divergence, log_sinhc, relative_excess
from pyro_kd.utils import guards
from pyro_kd.utils.tensors import tensors_in

__all__ = ["binary", "closed_form_kl", "is_same_map"]

Form = Callable[[Any, Any], Tensor | None]

_FORMS: dict[type, Form] = {}
"""Family -> KL of two of it; the first that both are instances of."""

_EULER = 0.57721566490153286061


def closed_form_kl(p: Any, q: Any) -> Tensor | None:
    """KL(p || q) of shape ``batch_shape``, or None where there is no closed form, or none that is right."""
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
    first, second = _gaussian(p), _gaussian(q)
    if first is not None and second is not None:
        return None if p.event_shape != q.event_shape else _gaussian_kl(first, second)
    value = cross_kl(p, q)
    return _between_images(p, q) if value is None else value


# Which pairs have a closed form.


def _has_law_of_its_own(family: type) -> bool:
    """Whether a user's class has a density of its own, so that the formulas for its base class do not hold for it."""
    for base in family.__mro__:
        if base.__module__.startswith(("torch.", "pyro.")):
            return False
        if "log_prob" in vars(base):
            return not any(family in pair for pair in kl._KL_REGISTRY)
    return False


def _is_registered_by_user(p: type, q: type) -> bool:
    """Whether torch's registry has a function for the pair that is neither torch's nor Pyro's."""
    if (p, q) not in kl._KL_MEMOIZE:
        kl._KL_MEMOIZE[p, q] = kl._dispatch_kl(p, q)  # as kl_divergence does
    form = kl._KL_MEMOIZE[p, q]
    return form is not NotImplemented and not form.__module__.startswith(("torch.", "pyro."))


def _between_images(p: Any, q: Any) -> Tensor | None:
    """Under equal one-to-one maps, which no gradient goes through, the KL of images is that of what was mapped."""
    if not isinstance(p, TransformedDistribution) or not isinstance(q, TransformedDistribution):
        return None
    if p.event_shape != q.event_shape or len(p.transforms) != len(q.transforms):
        return None
    pairs = list(zip(p.transforms, q.transforms, strict=True))
    return closed_form_kl(p.base_dist, q.base_dist) if all(is_same_map(*pair) for pair in pairs) else None


def is_same_map(first: Any, second: Any) -> bool:
    """Whether two transforms are one and the same one-to-one map, whatever they keep in a cache, and have nothing to train."""
    return (
        first.bijective
        and second.bijective
        and not _needs_gradient(first)
        and not _needs_gradient(second)
        and first == second
    )


def _needs_gradient(transform: Any) -> bool:
    """Whether a transform has parameters that require a gradient. What it keeps of its last call is no parameter."""
    return any(tensor.requires_grad for tensor in tensors_in(_without_cache(transform)))


def _without_cache(value: Any) -> Any:
    """The attributes of a transform and of those inside it, without their caches."""
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


def _independent(p: Independent, q: Independent) -> Tensor | None:
    ranks = p.reinterpreted_batch_ndims, q.reinterpreted_batch_ndims
    shared = min(ranks)
    inner = [
        Independent(fn.base_dist, rank - shared) if rank > shared else fn.base_dist
        for fn, rank in zip((p, q), ranks, strict=True)
    ]
    value = closed_form_kl(*inner)
    return None if value is None else sum_rightmost(value, shared)


def _zero_inflated(p: Any, q: Any) -> Tensor | None:
    """The point mass at 0 and the rest, which has no mass there where it is continuous."""
    if p.base_dist.support.is_discrete or q.base_dist.support.is_discrete:
        return None
    rest = closed_form_kl(p.base_dist, q.base_dist)
    if rest is None:
        return None
    gates = [binary(fn, "gate", "gate_logits") for fn in (p, q)]
    share = gates[0][1]
    return _binary_kl(*gates) + torch.where(share > 0, share * rest, 0)


# The forms. Each is given the parameters named, of p and then of q, in float64.


def _form(family: type, *names: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def form(p: Any, q: Any) -> Tensor | None:
            parameters = [getattr(fn, name) for fn in (p, q) for name in names]
            value = formula(*[parameter.double() for parameter in parameters])
            return value.to(common_dtype(*parameters))

        _FORMS[family] = form
        return formula

    return register


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that arithmetic with all of the tensors has."""
    return functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])


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
    """P(1), P(0) and their logarithms, from the parameter that the distribution was made of, in full accuracy."""
    if _was_given(fn, probs, logits) == probs:
        value = vars(fn)[probs] if dtype is None else vars(fn)[probs].to(dtype)
        return value, 1 - value, _log(value), _log1m(value)
    value = getattr(fn, logits) if dtype is None else getattr(fn, logits).to(dtype)
    return value.sigmoid(), (-value).sigmoid(), -softplus(-value), -softplus(value)


def _was_given(fn: Any, probs: str = "probs", logits: str = "logits") -> str:
    """The name of the parameter that a distribution was made of. The other one, once it was asked for, is kept beside it."""
    held = vars(fn)
    if "_param" in held:
        return probs if held["_param"] is held.get(probs) else logits
    return next(name for name in held if name in (probs, logits))


def _log(value: Tensor) -> Tensor:
    """The logarithm; its gradient at 0, where it is -inf, is 0."""
    return torch.where(value > 0, torch.where(value > 0, value, 1).log(), -torch.inf)


def _log1m(value: Tensor) -> Tensor:
    return torch.where(value < 1, torch.log1p(-torch.where(value < 1, value, 0)), -torch.inf)


def _binary_kl(p: tuple[Tensor, ...], q: tuple[Tensor, ...]) -> Tensor:
    (p1, p0, log_p1, log_p0), (_, _, log_q1, log_q0) = p, q
    return torch.where(p1 > 0, p1 * (log_p1 - log_q1), 0) + torch.where(p0 > 0, p0 * (log_p0 - log_q0), 0)


@_own_form(td.Bernoulli)
def _bernoulli(p: Any, q: Any) -> Tensor:
    if all(fn._param is vars(fn).get("logits") for fn in (p, q)):
        return _bernoulli_kl_of_logits(p.logits, q.logits)
    return _binary_kl(binary(p), binary(q))


def _bernoulli_kl_of_logits(p: Tensor, q: Tensor) -> Tensor:
    """The same in fewer operations. Where 1 is likely, 0 and 1 change places, so that terms are small where p and q are near."""
    a, b = p.abs().neg_(), torch.copysign(torch.ones_like(p), -p) * q
    probs = a.sigmoid()
    is_finite = (probs > 0) & (b < torch.inf)  # where b is infinite, so is its softplus
    return torch.where(is_finite, a - b, 0).mul_(probs).add_(softplus(b)).sub_(softplus(a))


@_own_form(td.Binomial)
def _binomial(p: Any, q: Any) -> Tensor | None:
    if not guards.holds(p.total_count >= q.total_count, "the teacher has at least as many trials"):
        return None  # with binomial coefficients, which do not cancel
    ours, theirs = binary(p, dtype=torch.float64), binary(q, dtype=torch.float64)
    equal = p.total_count * _binary_kl(ours, theirs)
    never = torch.where(ours[0] > 0, torch.inf, -q.total_count * theirs[3])  # more trials than the student's
    value = torch.where(p.total_count > q.total_count, never, equal)
    return value.to(common_dtype(p._param, q._param))


@_own_form(td.Geometric)
def _geometric(p: Any, q: Any) -> Tensor:
    (p1, p0, log_p1, log_p0), (_, _, log_q1, log_q0) = (binary(fn, dtype=torch.float64) for fn in (p, q))
    failures = torch.where(p0 > 0, p0 / p1 * (log_p0 - log_q0), 0)
    parameters = [vars(fn)[_was_given(fn)] for fn in (p, q)]
    return (log_p1 - log_q1 + failures).to(common_dtype(*parameters))


@_own_form(td.OneHotCategorical)
def _one_hot_categorical(p: Any, q: Any) -> Tensor | None:
    return _categorical(p._categorical, q._categorical)


@_own_form(td.Categorical)
def _categorical(p: Any, q: Any) -> Tensor | None:
    if p._num_events != q._num_events:
        return None
    log_p, log_q = (_log(fn.probs) if fn._param is vars(fn).get("probs") else fn.logits for fn in (p, q))
    return torch.where(p.probs > 0, p.probs * (log_p - log_q), 0).sum(-1)


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
    """As of Gumbels, which are the negative logarithms: of scale 1 / shape, at -log scale."""
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


# Gaussians over vectors: mean, standard deviations or None, and a triangular factor, or that of low rank, or None.

Gaussian = tuple[Tensor, Tensor | None, Tensor | None]


def _gaussian(fn: Any) -> Gaussian | None:
    if isinstance(fn, td.MultivariateNormal):
        return fn.loc, None, fn._unbroadcasted_scale_tril.double()
    if isinstance(fn, td.LowRankMultivariateNormal):
        return fn.loc, fn._unbroadcasted_cov_diag.double().sqrt(), fn._unbroadcasted_cov_factor.double()
    if isinstance(fn, Independent) and fn.reinterpreted_batch_ndims == 1 and type(fn.base_dist) in (dist.Normal, td.Normal):
        return fn.base_dist.loc, fn.base_dist.scale.double(), None
    return None


def _gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    (loc_p, std_p, factor_p), (loc_q, std_q, factor_q) = p, q
    squares = _whitened_square((loc_p.double() - loc_q.double()).unsqueeze(-1), std_q, factor_q)
    for part in (std_p, factor_p):
        if part is not None:
            squares = squares + _whitened_square(part, std_q, factor_q, is_diagonal=part is std_p)
    value = 0.5 * (squares - loc_p.shape[-1] + _log_det(std_q, factor_q) - _log_det(std_p, factor_p))
    rounding = torch.where(
        _are_equal(p, q), value.detach(), 0
    )  # the squares of a whitened factor do not sum to the dimension
    return (value - rounding).to(common_dtype(loc_p, loc_q))


def _are_equal(p: Gaussian, q: Gaussian) -> Tensor:
    """Where two laws have the same parameters, of shape ``batch_shape``."""
    equal = (p[0] == q[0]).all(-1)
    for first, second, dims in ((p[1], q[1], (-1,)), (p[2], q[2], (-2, -1))):
        if first is None or second is None:
            equal = equal & (first is second)
        else:
            equal = equal & ((first == second).all(dims) if first.shape[-1] == second.shape[-1] else False)
    return equal


def _whitened_square(part: Tensor, std: Tensor | None, factor: Tensor | None, is_diagonal: bool = False) -> Tensor:
    r"""Trace of :math:`X^T \Sigma^{-1} X` for a matrix X, or the diagonal of one."""
    if std is None:
        assert factor is not None
        return _solved_square(factor, part.diag_embed() if is_diagonal else part)
    scaled = part / (std if is_diagonal else std.unsqueeze(-1))
    if factor is None:
        return scaled.square().sum(-1) if is_diagonal else scaled.square().sum((-2, -1))
    # With V = factor / std and [V; 1] = [Q; P] R, (1 + V V')^-1 is 1 - Q Q', and Q'Q + P'P = 1: squares, which do not cancel.
    upper, lower, _ = _orthogonal(std, factor)
    if is_diagonal:
        return (scaled.square() * (1 - upper.square().sum(-1))).sum(-1)
    inner = upper.mT @ scaled
    return (scaled - upper @ inner).square().sum((-2, -1)) + (lower @ inner).square().sum((-2, -1))


def _orthogonal(std: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size, rank = factor.shape[-2:]
    scaled = factor / std.unsqueeze(-1)
    one = torch.eye(rank, dtype=factor.dtype, device=factor.device).expand(*scaled.shape[:-2], rank, rank)
    q, r = torch.linalg.qr(torch.cat([scaled, one], -2))
    return q[..., :size, :], q[..., size:, :], r


def _solved_square(triangular: Tensor, right: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(triangular.shape[:-2], right.shape[:-2])
    triangular, right = (x.expand(*batch, *x.shape[-2:]) for x in (triangular, right))
    return torch.linalg.solve_triangular(triangular, right, upper=False).square().sum((-2, -1))


def _log_det(std: Tensor | None, factor: Tensor | None) -> Tensor:
    """Of the covariance."""
    if std is None:
        assert factor is not None
        return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    value = 2 * std.log().sum(-1)
    if factor is None:
        return value
    return value + 2 * _orthogonal(std, factor)[2].diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
