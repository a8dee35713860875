r"""Divergences between the teacher's and the student's distribution at one site.

A divergence is any function ``d(p, q, value) -> Tensor`` of the teacher's distribution ``p``, the student's ``q`` and
the teacher's draw ``value ~ p``, which returns a tensor of shape ``p.batch_shape``. ``q`` alone carries gradients. The
ones here use a closed form where there is one, and else an estimate that is unbiased, and whose gradient with respect
to ``q`` is unbiased too.

A function may carry two attributes, which the losses read:

- ``is_analytic(p, q) -> bool``: whether this pair has a closed form (for reports);
- ``needs_support``: whether the divergence is infinite where ``p`` reaches outside the support of ``q`` (for errors).

Divergences know two distributions and no traces.
"""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.nn.functional import softplus

from pyro_kd.divergences.closed_forms import closed_form_kl
from pyro_kd.divergences.log_densities import log_densities, log_density
from pyro_kd.errors import UnsupportedDivergenceError
from pyro_kd.noise.point_masses import Mass, mass_of, point_of
from pyro_kd.noise.samplers import draw_of, unwrapped

__all__ = ["Divergence", "cross_entropy", "jensen_shannon", "kl", "reverse_kl", "wasserstein2"]

Divergence = Callable[[Any, Any, Tensor], Tensor]


def kl(p: Distribution, q: Distribution, value: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence from the student to the teacher, the d of Eq. 4.

    .. math:: KL(p \,\|\, q) = E_{x \sim p} [\log p(x) - \log q(x)]

    In closed form where torch or Pyro has it, else the integrand at the teacher's draw.

    Args:
        p: the teacher's distribution.
        q: the student's distribution, of the same event shape.
        value: a draw from ``p``, of shape ``batch_shape + event_shape``.

    Returns:
        Tensor of shape ``batch_shape``; an estimate may be negative.

    Raises:
        UnsupportedDivergenceError: it is infinite whatever the parameters, since p has point masses and q a density, or the reverse.

    Example:
        >>> import pyro.distributions as dist
        >>> kl(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0), torch.tensor(0.0))
        tensor(0.5000)
    """
    _require_common_mass(p, q, "kl", "p")
    closed = closed_form_kl(p, q)
    if closed is not None:
        return closed
    log_p, log_q = log_densities(p, q, value)
    return log_p - log_q


def cross_entropy(p: Distribution, q: Distribution, value: Tensor) -> Tensor:
    r"""Cross entropy of the student relative to the teacher, at the teacher's draw: the fit of a density to given values.

    .. math:: H(p, q) = -E_{x \sim p} [\log q(x)] = KL(p \,\|\, q) + H(p)

    For a teacher's point mass (Delta), whose KL to a density is infinite: with a student's Normal of fixed scale it is the squared
    error. It may be negative, has no lower bound where the student's scale is trained, and bounds no KL.

    Args, Returns: as for :func:`kl`.
    """
    return -log_density(q, value)


def reverse_kl(p: Distribution, q: Distribution, value: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence from the teacher to the student: the mode-seeking direction.

    .. math:: KL(q \,\|\, p) = E_{x \sim q} [\log q(x) - \log p(x)]

    In closed form where there is one; else at a reparametrised draw of the student; else, for a student without
    ``rsample``, at the teacher's draw by importance weighting, :math:`E_p[r \log r - r + 1]` with :math:`r = q / p`,
    which needs the support of ``q`` inside that of ``p`` and has a large variance where they differ much.

    Args, Returns: as for :func:`kl`.
    """
    _require_common_mass(p, q, "reverse_kl", "q")
    closed = closed_form_kl(q, p)
    if closed is not None:
        return closed
    if q.has_rsample:
        log_q, log_p = log_densities(q, p, draw_of(q))
        return log_q - log_p
    log_ratio = _log_ratio(p, q, value)
    return log_ratio.exp() * (log_ratio - 1) + 1


def jensen_shannon(p: Distribution, q: Distribution, value: Tensor) -> Tensor:
    r"""Jensen-Shannon divergence by Monte Carlo at the teacher's draw.

    .. math:: JS(p, q) = \tfrac12 KL(p \,\|\, m) + \tfrac12 KL(q \,\|\, m)
              = E_{x \sim p}\left[ \tfrac12 \log\frac{2}{1 + r} + \tfrac{r}{2} \log\frac{2 r}{1 + r} \right],
              \quad m = \tfrac12 (p + q), \; r = q / p

    The integrand is non-negative, and the estimate unbiased where the support of ``q`` lies inside that of ``p``; where
    ``q`` puts mass c outside it, the estimate is short by :math:`c \tfrac12 \log 2`.

    Args, Returns: as for :func:`kl`; between 0 and log 2 in expectation.
    """
    _require_common_mass(p, q, "jensen_shannon", "both")
    log_ratio = _log_ratio(p, q, value)
    log_two = torch.log(torch.tensor(2.0, dtype=log_ratio.dtype, device=log_ratio.device))
    log_mean = softplus(log_ratio) - log_two  # log((1 + r) / 2)
    return 0.5 * (log_ratio.exp() * (log_ratio - log_mean) - log_mean)


def wasserstein2(p: Distribution, q: Distribution, value: Tensor) -> Tensor:
    r"""Squared 2-Wasserstein distance between Gaussians, diagonal or of full covariance, point masses, and independent uniforms.

    .. math:: W_2^2 = \|\mu_p - \mu_q\|^2 + \mathrm{tr}\left(\Sigma_p + \Sigma_q
              - 2 (\Sigma_p^{1/2} \Sigma_q \Sigma_p^{1/2})^{1/2}\right)

    Summed over the event, as the squared distance is. Between two point masses it is their squared Euclidean distance,
    which makes feature distillation of Delta sites (Eq. 8).

    Args, Returns: as for :func:`kl`; ``value`` is not used.

    Raises:
        UnsupportedDivergenceError: one of the two is neither Gaussian nor a point mass, and they are not both uniform.
    """
    if _is_uniform(p) and _is_uniform(q):
        return _between_uniforms(p, q)
    p_gauss, q_gauss = _diagonal_gaussian(p), _diagonal_gaussian(q)
    if p_gauss is not None and q_gauss is not None:
        squared = (p_gauss[0] - q_gauss[0]).square() + (p_gauss[1] - q_gauss[1]).square()
        return squared.reshape(*squared.shape[: squared.dim() - len(p.event_shape)], -1).sum(-1)
    other = next((fn for fn, found in ((p, p_gauss), (q, q_gauss)) if found is None and not _is_full_gaussian(fn)), None)
    if other is not None:
        raise UnsupportedDivergenceError(
            "wasserstein2 has a closed form for Normal, MultivariateNormal, Delta, and two of Uniform, not for "
            f"{_name(p)} (teacher) and {_name(q)} (student): {_name(other)} is none of these. Use kl, or a function "
            "d(p, q, value) of your own"
        )
    (p_mean, p_factor), (q_mean, q_factor) = _full_gaussian(p), _full_gaussian(q)
    first, second = p_factor.double(), q_factor.double()  # squares of the scales cancel below
    # tr (S_p^1/2 S_q S_p^1/2)^1/2 is the nuclear norm of L_p' L_q, for any factors with S = L L'.
    cross = torch.linalg.svdvals(first.mT @ second).sum(-1)
    spread = first.square().sum((-2, -1)) + second.square().sum((-2, -1)) - 2 * cross
    moved = (p_mean - q_mean).square().sum(-1)
    return moved + spread.to(moved.dtype)


def _between_uniforms(p: Any, q: Any) -> Tensor:
    """Of two laws of one shape: the distance of their means and of their standard deviations."""
    (low_p, high_p), (low_q, high_q) = (
        (fn.support.base_constraint.lower_bound, fn.support.base_constraint.upper_bound)
        if isinstance(fn, Independent)
        else (fn.low, fn.high)
        for fn in (p, q)
    )
    low, high = low_p.double() - low_q.double(), high_p.double() - high_q.double()
    moved = (low + high).square() / 4 + (high - low).square() / 12
    return sum_rightmost(moved, len(p.event_shape)).to(torch.promote_types(low_p.dtype, low_q.dtype))


def _log_ratio(p: Distribution, q: Distribution, value: Tensor) -> Tensor:
    """Log q / p, bounded below, where the integrands have reached their limit for q = 0, and would be 0 times infinity."""
    log_p, log_q = log_densities(p, q, value)
    return (log_q - log_p).clamp(min=-1e4)


def _require_common_mass(p: Any, q: Any, name: str, infinite_from: str) -> None:
    """Raise where one law has point masses and the other none, so that a KL is infinite, or a comparison of densities senseless.

    Args:
        p: the teacher's law.
        q: the student's.
        name: of the divergence.
        infinite_from: ``"p"`` where it is enough that q has the mass that p has, ``"q"`` for the reverse, ``"both"`` for both.
    """
    first, second = mass_of(p), mass_of(q)
    missing = {"p": first & ~second, "q": second & ~first, "both": first ^ second}[infinite_from]
    if not missing:
        return
    has, lacks, side = (p, q, "teacher") if missing & first else (q, p, "student")
    part = "point masses" if missing & Mass.POINTS else "a density"
    raise UnsupportedDivergenceError(
        f"{name} of {_name(p)} (teacher) and {_name(q)} (student) is infinite, whatever their parameters: {_name(has)} of the {side} "
        f"has {part}, and {_name(lacks)} has none. "
        + (
            "To fit the student's density to the teacher's values, name pyro_kd.divergences.cross_entropy as divergence (at a "
            "latent: latent_divergence), which bounds no KL"
            if side == "teacher" and part == "point masses"
            else "Give both programs a density there; or use pyro_kd.divergences.wasserstein2, where it applies, as divergence (at a "
            "latent: latent_divergence), which bounds no KL"
        )
    )


def _name(fn: Any) -> str:
    return type(unwrapped(fn)).__name__


def _is_uniform(fn: Any) -> bool:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return isinstance(fn, torch.distributions.Uniform)


def _diagonal_gaussian(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation, of shape batch_shape + event_shape, or None for other distributions.

    Both are 0 where a mask under ``to_event`` leaves elements of the event out.
    """
    masks = []
    while isinstance(fn, Independent | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append(fn._mask)
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.Normal):
        moments = fn.loc, fn.scale
    else:
        point = point_of(fn)
        if point is None:
            return None
        moments = point, torch.zeros_like(point)
    for mask in masks:
        keep = torch.as_tensor(mask, device=moments[0].device)
        keep = keep.reshape(*keep.shape, *[1] * len(fn.event_shape))
        moments = moments[0].where(keep, 0), moments[1].where(keep, 0)
    return moments


def _full_gaussian(fn: Any) -> tuple[Tensor, Tensor]:
    """Mean and a factor L of the covariance L L' of a distribution over vectors."""
    if _is_full_gaussian(fn):
        return fn.loc, fn.scale_tril
    diagonal = _diagonal_gaussian(fn)
    if diagonal is not None and len(fn.event_shape) == 1:
        return diagonal[0], torch.diag_embed(diagonal[1])
    raise UnsupportedDivergenceError(
        f"wasserstein2 has a closed form for Normal, MultivariateNormal, Delta, and two of Uniform, not for {type(fn).__name__} with "
        f"event shape {tuple(fn.event_shape)}. Use kl, or a function d(p, q, value) of your own"
    )


def _is_full_gaussian(fn: Any) -> bool:
    return isinstance(fn, torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal)


def _has_closed_kl(p: Distribution, q: Distribution) -> bool:
    return closed_form_kl(p, q) is not None


kl.is_analytic = _has_closed_kl  # type: ignore[attr-defined]
kl.needs_support = True  # type: ignore[attr-defined]
reverse_kl.is_analytic = lambda p, q: _has_closed_kl(q, p)  # type: ignore[attr-defined]
wasserstein2.is_analytic = lambda p, q: True  # type: ignore[attr-defined]
cross_entropy.is_analytic = lambda p, q: point_of(p) is not None  # type: ignore[attr-defined]
jensen_shannon.is_analytic = lambda p, q: False  # type: ignore[attr-defined]
