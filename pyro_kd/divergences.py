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
from torch.distributions import Distribution, Independent, Kumaraswamy
from torch.nn.functional import softplus

from pyro_kd.closed_forms import closed_form_kl
from pyro_kd.errors import UnsupportedDivergenceError

__all__ = ["Divergence", "jensen_shannon", "kl", "reverse_kl", "wasserstein2"]

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

    Example:
        >>> import pyro.distributions as dist
        >>> kl(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0), torch.tensor(0.0))
        tensor(0.5000)
    """
    closed = closed_form_kl(p, q)
    return _log_prob(p, value) - _log_prob(q, value) if closed is None else closed


def reverse_kl(p: Distribution, q: Distribution, value: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence from the teacher to the student: the mode-seeking direction.

    .. math:: KL(q \,\|\, p) = E_{x \sim q} [\log q(x) - \log p(x)]

    In closed form where there is one; else at a reparametrised draw of the student; else, for a student without
    ``rsample``, at the teacher's draw by importance weighting, :math:`E_p[r \log r - r + 1]` with :math:`r = q / p`,
    which needs the support of ``q`` inside that of ``p`` and has a large variance where they differ much.

    Args, Returns: as for :func:`kl`.
    """
    closed = closed_form_kl(q, p)
    if closed is not None:
        return closed
    if q.has_rsample:
        draw = q.rsample()
        return _log_prob(q, draw) - _log_prob(p, draw)
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
    if _is_uniform(p) and _is_uniform(q):  # two laws of one shape: the distance of their means and standard deviations
        moved = (p.mean - q.mean).square() + (p.stddev - q.stddev).square()
        return sum_rightmost(moved, len(p.event_shape))
    p_gauss, q_gauss = _diagonal_gaussian(p), _diagonal_gaussian(q)
    if p_gauss is not None and q_gauss is not None:
        squared = (p_gauss[0] - q_gauss[0]).square() + (p_gauss[1] - q_gauss[1]).square()
        return squared.reshape(*squared.shape[: squared.dim() - len(p.event_shape)], -1).sum(-1)
    (p_mean, p_factor), (q_mean, q_factor) = _full_gaussian(p), _full_gaussian(q)
    # tr (S_p^1/2 S_q S_p^1/2)^1/2 is the nuclear norm of L_p' L_q, for any factors with S = L L'.
    cross = torch.linalg.svdvals(p_factor.mT @ q_factor).sum(-1)
    spread = p_factor.square().sum((-2, -1)) + q_factor.square().sum((-2, -1)) - 2 * cross
    return (p_mean - q_mean).square().sum(-1) + spread


def _log_prob(fn: Any, value: Tensor) -> Tensor:
    """The log density; of Kumaraswamy without torch's chain of transforms, which is infinite where 1 - x^a rounds to 1 or 0."""
    if isinstance(fn, Independent):
        return sum_rightmost(_log_prob(fn.base_dist, value), fn.reinterpreted_batch_ndims)
    if isinstance(fn, Kumaraswamy):
        finfo = torch.finfo(value.dtype)
        a, b, log_x = fn.concentration1, fn.concentration0, value.clamp(finfo.tiny, 1 - finfo.eps / 2).log()
        return a.log() + b.log() + (a - 1) * log_x + (b - 1) * (-(a * log_x).expm1()).log()
    log_prob: Tensor = fn.log_prob(value)
    return log_prob


def _log_ratio(p: Distribution, q: Distribution, value: Tensor) -> Tensor:
    """Log q / p, bounded below, where the integrands have reached their limit for q = 0, and would be 0 times infinity."""
    return (_log_prob(q, value) - _log_prob(p, value)).clamp(min=-1e4)


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
    elif isinstance(fn, dist.Delta):
        moments = fn.v, torch.zeros_like(fn.v)
    else:
        return None
    for mask in masks:
        keep = torch.as_tensor(mask, device=moments[0].device)
        keep = keep.reshape(*keep.shape, *[1] * len(fn.event_shape))
        moments = moments[0].where(keep, 0), moments[1].where(keep, 0)
    return moments


def _full_gaussian(fn: Any) -> tuple[Tensor, Tensor]:
    """Mean and a factor L of the covariance L L' of a distribution over vectors."""
    if len(fn.event_shape) == 1:
        diagonal = _diagonal_gaussian(fn)
        if diagonal is not None:
            return diagonal[0], torch.diag_embed(diagonal[1])
        if isinstance(fn, torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal):
            return fn.loc, fn.scale_tril
    raise UnsupportedDivergenceError(
        f"wasserstein2 has a closed form for Normal, MultivariateNormal, Delta, and two of Uniform, not for {type(fn).__name__} with "
        f"event shape {tuple(fn.event_shape)}. Use kl, or a function d(p, q, value) of your own"
    )


def _has_closed_kl(p: Distribution, q: Distribution) -> bool:
    return closed_form_kl(p, q) is not None


kl.is_analytic = _has_closed_kl  # type: ignore[attr-defined]
kl.needs_support = True  # type: ignore[attr-defined]
reverse_kl.is_analytic = lambda p, q: _has_closed_kl(q, p)  # type: ignore[attr-defined]
wasserstein2.is_analytic = lambda p, q: True  # type: ignore[attr-defined]
jensen_shannon.is_analytic = lambda p, q: False  # type: ignore[attr-defined]
