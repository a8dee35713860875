"""Whether the two distributions of a pair can be compared: over the same plates, events and values, with the same weighting.

Stands between pairing and divergences. Knows distributions and pairs; no traces, no losses.
"""

from typing import Any

import torch
from pyro.distributions.distribution import Distribution as PyroDistribution
from torch.distributions import Distribution, constraints

from pyro_kd.errors import PlateMismatchError, SupportMismatchError, UnsupportedDivergenceError
from pyro_kd.noise.point_masses import is_point, support_of
from pyro_kd.noise.samplers import unwrapped
from pyro_kd.sites.pairing import SitePair
from pyro_kd.sites.plates import differing_plates, sizes_around, undeclared_dims
from pyro_kd.sites.weighting import inner_mask, require_same_weighting
from pyro_kd.utils import guards
from pyro_kd.utils.advice import advice

__all__ = ["check_comparable", "check_same_weighting", "support_mismatch"]


def check_comparable(pair: SitePair, *, needs_support: bool, is_vectorized: bool) -> None:
    """Raise if the two distributions of a pair are over different spaces.

    A batch dimension without a plate counts as one of independent draws.

    Args:
        pair: the pair.
        needs_support: whether the student's support must contain the teacher's.
        is_vectorized: whether the run draws several particles at once, in an additional dimension.

    Raises:
        UnsupportedDivergenceError: one of them is not a distribution.
        PlateMismatchError: the batch shapes differ or, with ``is_vectorized``, have a dimension without a plate.
        SupportMismatchError: the event shapes differ, only one of the two is discrete, or, with ``needs_support``, the
            teacher's support reaches outside the student's.
    """
    p, q = pair.p, pair.q
    _require_distribution(p, pair, "teacher")
    _require_distribution(q, pair, "student")
    if not (hasattr(p, "batch_shape") and hasattr(q, "batch_shape")):  # Pyro asks for log_prob alone
        return
    if p.batch_shape != q.batch_shape:
        differ = differing_plates(student=sizes_around(pair.student_plates), teacher=sizes_around(pair.plates))
        raise PlateMismatchError(
            f"site {pair.name!r} has batch shape {tuple(p.batch_shape)} in the teacher and {tuple(q.batch_shape)} in the "
            f"student{differ and f': {differ}'}. Put the site in the same plates in both programs, and "
            "declare other dimensions with .to_event()."
        )
    for dim in undeclared_dims(p.batch_shape, pair.plates) if is_vectorized else ():
        raise PlateMismatchError(
            f"site {pair.name!r} has batch shape {tuple(p.batch_shape)} and no plate for dimension {dim}. With vectorize_particles, "
            "draws along it cannot be told from particles, and the loss would count them more than once. Declare the dimension by "
            ".to_event(1) on the distribution or by pyro.plate; index parents so that they broadcast with the plates; or leave out "
            "vectorize_particles, so that the particles run one after the other."
        )
    reason = None
    if p.event_shape != q.event_shape:
        reason = f"events of shape {tuple(p.event_shape)} against {tuple(q.event_shape)}"
    else:
        p_support, q_support = _support(p), _support(q)
        if p_support is not None and q_support is not None:
            if p_support.is_discrete != q_support.is_discrete:
                reason = "one is discrete, the other continuous"
            elif needs_support and not _contained(p_support, q_support):
                reason = "the teacher's support reaches outside the student's, so that KL(teacher || student) is infinite"
                if _contained(q_support, p_support):
                    reason += (
                        " (but not in the other direction: the order is loss(student, teacher), Distiller(student, teacher))"
                    )
    if reason is not None:
        raise support_mismatch(pair.name, p, q, reason, is_target=pair.is_target)


def support_mismatch(name: str, p: Any, q: Any, reason: str, *, is_target: bool) -> SupportMismatchError:
    """The error for a site whose distributions are over different values.

    Args:
        name: of the site.
        p: the teacher's distribution.
        q: the student's distribution.
        reason: how they differ.
        is_target: whether the site is a target, which cannot be left out.
    """
    return SupportMismatchError(
        f"supports differ at site {name!r}: teacher {_describe(p)}, student {_describe(q)}: {reason}. Give the student a "
        f"distribution over the same values at this site{'' if is_target else advice().leaving_out(name)}."
    )


def _require_distribution(fn: Any, pair: SitePair, role: str) -> None:
    if not isinstance(fn, Distribution | PyroDistribution):
        raise UnsupportedDivergenceError(
            f"site {pair.name!r} of the {role} samples from {fn!r:.60}, which is not a distribution, so it has no divergence. "
            f"Sample from a pyro.distributions object{'' if pair.is_target else advice().leaving_out(pair.name)}."
        )


def _support(fn: Any) -> Any:
    if is_point(fn):
        return None  # a Delta claims all real numbers, and may as well be a category or a count
    support = support_of(fn)
    return support if hasattr(support, "is_discrete") else None


def _contained(inner: Any, outer: Any) -> bool:
    """Whether one interval, or union of some, lies in another. Supports that are not intervals of numbers pass."""
    if (parts := getattr(inner, "parts", None)) is not None:
        return all(_contained(part, outer) for part in parts)
    (low, high), (outer_low, outer_high) = _bounds(inner), _bounds(outer)
    return guards.holds(low >= outer_low, "a support begins inside the other") and guards.holds(
        high <= outer_high, "a support ends inside the other"
    )


def _bounds(support: Any) -> tuple[Any, Any]:
    low = getattr(support, "lower_bound", -torch.inf)
    high = getattr(support, "upper_bound", torch.inf)
    if support is constraints.boolean:
        low, high = 0, 1
    return low, high


def _describe(fn: Any) -> str:
    support, name = _support(fn), type(unwrapped(fn)).__name__
    return f"{name} over {support}" if support is not None else name


def check_same_weighting(pair: SitePair) -> None:
    """Raise PlateMismatchError if scale or mask of a pair differ.

    They may depend on draws, so this is checked in every run.
    """
    try:
        require_same_weighting(pair.scale, pair.teacher_scale, name=pair.name, what="scale")
        require_same_weighting(pair.mask, pair.teacher_mask, name=pair.name, what="mask")
        require_same_weighting(inner_mask(pair.q), inner_mask(pair.p), name=pair.name, what="mask")
    except PlateMismatchError as error:
        differ = differing_plates(student=sizes_around(pair.student_plates), teacher=sizes_around(pair.plates))
        if differ:
            raise PlateMismatchError(f"{differ}: {error}") from None
        raise
