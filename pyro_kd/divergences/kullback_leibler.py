r"""Divergences of densities: the Kullback-Leibler divergence in both directions, cross entropy, and Jensen-Shannon.

Each uses a closed form where there is one, and otherwise an estimate at a draw that is unbiased, as is its gradient with
respect to the student's distribution.
"""

from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import softplus

from pyro_kd.divergences.closed_forms import closed_form_kl
from pyro_kd.divergences.divergence import Divergence, require_same_events
from pyro_kd.divergences.log_densities import log_densities, log_density
from pyro_kd.divergences.wasserstein import wasserstein2
from pyro_kd.errors import UnsupportedDivergenceError
from pyro_kd.noise.point_masses import Mass, mass_of, point_of
from pyro_kd.noise.samplers import draw_of, has_derivative, unwrapped

__all__ = ["cross_entropy", "jensen_shannon", "kl", "reverse_kl"]


def _has_closed_form(p: Any, q: Any) -> bool:
    return closed_form_kl(p, q) is not None


@partial(
    Divergence,
    exact=_has_closed_form,
    needs_support=True,
    for_points=wasserstein2,
    stackable=(dist.Normal, dist.Bernoulli),
)
def kl(p: Distribution, q: Distribution, value: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence KL(teacher || student), the d of Eq. 4.

    .. math:: KL(p \,\|\, q) = E_{x \sim p} [\log p(x) - \log q(x)]

    In closed form if there is one, else estimated by the integrand at the teacher's draw.

    Args:
        p: the teacher's distribution.
        q: the student's distribution, of the same event shape.
        value: a draw from ``p``, of shape ``batch_shape + event_shape``.

    Returns:
        Tensor of shape ``batch_shape``; an estimate may be negative.

    Raises:
        UnsupportedDivergenceError: the divergence is infinite whatever the parameters, since p has point masses and q does not, or
            p has a density and q does not.

    Example:
        >>> import pyro.distributions as dist
        >>> kl(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0), torch.tensor(0.0))
        tensor(0.5000)
    """
    _require_common_mass(p, q, "kl", "p")
    closed = closed_form_kl(p, q)
    if closed is not None:
        return closed
    require_same_events(p, q, "kl")
    log_p, log_q = log_densities(p, q, value)
    return log_p - log_q


@partial(Divergence, exact=lambda p, q: point_of(p) is not None)
def cross_entropy(p: Distribution, q: Distribution, value: Tensor) -> Tensor:
    r"""Cross entropy of the student relative to the teacher, at the teacher's draw: fits a density to given values.

    .. math:: H(p, q) = -E_{x \sim p} [\log q(x)] = KL(p \,\|\, q) + H(p)

    It serves a teacher's point mass (Delta), whose KL to a density is infinite. With a student's Normal of fixed scale it is the
    squared error. It may be negative, has no lower bound if the student's scale is trained, and bounds no KL.

    Args, Returns: as for :func:`kl`.
    """
    require_same_events(p, q, "cross_entropy")
    return -log_density(q, value)


@partial(
    Divergence,
    exact=lambda p, q: _has_closed_form(q, p),
    for_points=wasserstein2,
    stackable=(dist.Normal, dist.Bernoulli),
    draws_from_student=True,
)
def reverse_kl(p: Distribution, q: Distribution, value: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence KL(student || teacher), the mode-seeking direction.

    .. math:: KL(q \,\|\, p) = E_{x \sim q} [\log q(x) - \log p(x)]

    In closed form if there is one; else at a reparametrised draw of the student; else, for a student without
    ``rsample``, at the teacher's draw by importance weighting, :math:`E_p[r \log r - r + 1]` with :math:`r = q / p`.
    That needs the support of ``q`` inside that of ``p``, and its variance is large if the two differ much.

    Args, Returns: as for :func:`kl`.
    """
    _require_common_mass(p, q, "reverse_kl", "q")
    closed = closed_form_kl(q, p)
    if closed is not None:
        return closed
    require_same_events(p, q, "reverse_kl")
    if has_derivative(q):
        log_q, log_p = log_densities(q, p, draw_of(q))
        return log_q - log_p
    log_ratio = _log_ratio(p, q, value)
    return log_ratio.exp() * (log_ratio - 1) + 1


@partial(Divergence, exact=False)
def jensen_shannon(p: Distribution, q: Distribution, value: Tensor) -> Tensor:
    r"""Jensen-Shannon divergence by Monte Carlo at the teacher's draw.

    .. math:: JS(p, q) = \tfrac12 KL(p \,\|\, m) + \tfrac12 KL(q \,\|\, m)
              = E_{x \sim p}\left[ \tfrac12 \log\frac{2}{1 + r} + \tfrac{r}{2} \log\frac{2 r}{1 + r} \right],
              \quad m = \tfrac12 (p + q), \; r = q / p

    The integrand is non-negative. The estimate is unbiased if the support of ``q`` lies inside that of ``p``; if
    ``q`` has mass c outside, the estimate is too small by :math:`c \tfrac12 \log 2`.

    Args, Returns: as for :func:`kl`. The expectation is between 0 and log 2.
    """
    _require_common_mass(p, q, "jensen_shannon", "both")
    require_same_events(p, q, "jensen_shannon")
    log_ratio = _log_ratio(p, q, value)
    log_two = torch.log(torch.tensor(2.0, dtype=log_ratio.dtype, device=log_ratio.device))
    log_mean = softplus(log_ratio) - log_two  # log((1 + r) / 2)
    return 0.5 * (log_ratio.exp() * (log_ratio - log_mean) - log_mean)


def _log_ratio(p: Distribution, q: Distribution, value: Tensor) -> Tensor:
    """Log q / p, bounded below: there the integrands have reached their limit for q = 0, which is else 0 times infinity."""
    log_p, log_q = log_densities(p, q, value)
    return (log_q - log_p).clamp(min=-1e4)


def _require_common_mass(p: Any, q: Any, name: str, infinite_from: str) -> None:
    """Raise if only one law has point masses or a density, so that a KL is infinite and densities cannot be compared.

    Args:
        p: the teacher's law.
        q: the student's law.
        name: of the divergence.
        infinite_from: ``"p"`` if q must have the parts that p has, ``"q"`` if p must have those of q, ``"both"`` for both.
    """
    first, second = mass_of(p), mass_of(q)
    missing = {"p": first & ~second, "q": second & ~first, "both": first ^ second}[infinite_from]
    if not missing:
        return
    has, lacks, side = (p, q, "teacher") if missing & first else (q, p, "student")
    part = "point masses" if missing & Mass.POINTS else "a density"
    raise UnsupportedDivergenceError(
        f"{name} of {_name(p)} (teacher) and {_name(q)} (student) is infinite, whatever their parameters: {_name(has)} of the {side} "
        f"has {part}, but {_name(lacks)} has none. "
        + (
            "To fit the student's density to the teacher's values, use pyro_kd.divergences.cross_entropy, which bounds no KL"
            if side == "teacher" and part == "point masses"
            else "Give both programs a density there; or use pyro_kd.divergences.wasserstein2, if it applies, which bounds no KL"
        )
    )


def _name(fn: Any) -> str:
    return type(unwrapped(fn)).__name__
