"""The squared 2-Wasserstein distance, for the pairs that have a closed form."""

from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_kd.divergences.divergence import Divergence, require_same_events
from pyro_kd.errors import UnsupportedDivergenceError
from pyro_kd.noise.point_masses import point_of
from pyro_kd.noise.samplers import unwrapped

__all__ = ["wasserstein2"]


@partial(Divergence, exact=True, stackable=(dist.Normal,))
def wasserstein2(p: Distribution, q: Distribution, value: Tensor) -> Tensor:
    r"""Squared 2-Wasserstein distance between Gaussians of any covariance, point masses, and independent uniforms.

    .. math:: W_2^2 = \|\mu_p - \mu_q\|^2 + \mathrm{tr}\left(\Sigma_p + \Sigma_q
              - 2 (\Sigma_p^{1/2} \Sigma_q \Sigma_p^{1/2})^{1/2}\right)

    Like the squared distance, it is summed over the event. Between two point masses it is their squared Euclidean distance,
    which makes distillation of Delta sites feature distillation (Eq. 8).

    Args:
        p: the teacher's distribution.
        q: the student's distribution, of the same event shape.
        value: not used.

    Returns:
        Tensor of shape ``batch_shape``.

    Raises:
        UnsupportedDivergenceError: one of the two is neither Gaussian nor a point mass, and they are not both uniform.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyro_kd.divergences import wasserstein2
        >>> wasserstein2(dist.Normal(0.0, 1.0), dist.Normal(3.0, 2.0), torch.tensor(0.0))
        tensor(10.)
    """
    require_same_events(p, q, "wasserstein2")
    if _is_uniform(p) and _is_uniform(q):
        return _between_uniforms(p, q)
    p_gauss, q_gauss = _diagonal_gaussian(p), _diagonal_gaussian(q)
    if p_gauss is not None and q_gauss is not None:
        squared = (p_gauss[0] - q_gauss[0]).square() + (p_gauss[1] - q_gauss[1]).square()
        return squared.reshape(*squared.shape[: squared.dim() - len(p.event_shape)], -1).sum(-1)
    other = next((fn for fn, found in ((p, p_gauss), (q, q_gauss)) if found is None and not _is_full_gaussian(fn)), None)
    if other is not None:
        raise UnsupportedDivergenceError(
            "wasserstein2 has a closed form for Normal, MultivariateNormal and Delta, and between two Uniform, not for "
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
    """The squared distance between the means, plus that between the standard deviations: both laws have one shape."""
    (low_p, high_p), (low_q, high_q) = (
        (fn.support.base_constraint.lower_bound, fn.support.base_constraint.upper_bound)
        if isinstance(fn, Independent)
        else (fn.low, fn.high)
        for fn in (p, q)
    )
    low, high = low_p.double() - low_q.double(), high_p.double() - high_q.double()
    moved = (low + high).square() / 4 + (high - low).square() / 12
    return sum_rightmost(moved, len(p.event_shape)).to(torch.promote_types(low_p.dtype, low_q.dtype))


def _name(fn: Any) -> str:
    return type(unwrapped(fn)).__name__


def _is_uniform(fn: Any) -> bool:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return isinstance(fn, torch.distributions.Uniform)


def _diagonal_gaussian(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation, of shape ``batch_shape + event_shape``; None for other distributions.

    Both are 0 where a mask under ``to_event`` removes elements of the event.
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
        f"wasserstein2 has a closed form for Normal, MultivariateNormal and Delta, and between two Uniform, not for "
        f"{type(fn).__name__} with event shape {tuple(fn.event_shape)}. Use kl, or a function d(p, q, value) of your own"
    )


def _is_full_gaussian(fn: Any) -> bool:
    return isinstance(fn, torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal)
