"""Scale and mask of a sample site: which of its elements count, and whether two programs agree on that.

Knows Pyro's site dictionaries and messages; no pairs, no losses.
"""

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_kd.errors import PlateMismatchError
from pyro_kd.utils import guards

__all__ = ["compared_elements", "inner_mask", "require_same_weighting", "unmask"]


_WRAPPERS = (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)


def compared_elements(site: Mapping[str, Any]) -> bool | Tensor:
    """Which elements of a site's value count: those that no mask hides and no scale of 0 removes.

    Args:
        site: Pyro's site dictionary, or a message to which plates and masks have been applied.

    Returns:
        True or False if all elements are equal in this; else a boolean tensor that broadcasts with the value, whose shape is
        ``batch_shape + event_shape``.
    """
    event_dim = len(getattr(site["fn"], "event_shape", ()))
    counts = _of_events(site["mask"], event_dim)
    scale = site["scale"]
    if isinstance(scale, Tensor):
        counts = _both(counts, _of_events(scale != 0, event_dim))
    elif scale == 0:
        return False
    fn = site["fn"]
    while isinstance(fn, _WRAPPERS):
        if isinstance(fn, dist.MaskedDistribution):
            counts = _both(counts, _of_events(fn._mask, len(fn.event_shape)))
        fn = fn.base_dist
    return counts


def _of_events(mask: bool | Tensor | None, event_dim: int) -> bool | Tensor:
    """A mask over batch dimensions, made to broadcast with batch and event dimensions."""
    if mask is None:
        return True
    return mask.reshape([*mask.shape, *[1] * event_dim]) if isinstance(mask, Tensor) else bool(mask)


def _both(first: bool | Tensor, second: bool | Tensor) -> bool | Tensor:
    if first is False or second is False:
        return False
    return second if first is True else first if second is True else first & second


def unmask(fn: Any, mask: Any) -> tuple[Any, Any]:
    """Split ``fn.mask(...)`` into the distribution and its mask, combined with the mask of the site."""
    while isinstance(fn, dist.MaskedDistribution):
        mask = fn._mask if mask is None else mask & fn._mask
        fn = fn.base_dist
    return fn, None if mask is True else mask


def inner_mask(fn: Any) -> Any:
    """The mask of ``fn.mask(...).to_event(...)``, or None."""
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return unmask(fn, None)[1]


def require_same_weighting(student: Any, teacher: Any, *, name: str, what: str) -> None:
    """Raise PlateMismatchError if student and teacher have different scales or masks at a site.

    Args:
        student, teacher: the scales or masks: numbers, None, or tensors that broadcast with the batch shape.
        name: of the site.
        what: ``"scale"`` or ``"mask"``.
    """
    if not guards.equal(student, teacher, _QUESTIONS[what]) and not _equal_elements(student, teacher, _QUESTIONS[what]):
        raise PlateMismatchError(
            f"the {what} of site {name!r} differs: teacher {_short(teacher)}, student {_short(student)}. Use the same plate sizes, "
            f"subsamples and poutine.{what} in both programs. If "
            f"draws decide on the {what}, make them targets; weight 0 leaves a latent out of the comparison."
        )


def _equal_elements(first: Any, second: Any, question: str) -> bool:
    """Whether two tensors of different shapes have equal elements where they broadcast."""
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)) or first.shape == second.shape:
        return False
    try:
        mine, theirs = torch.broadcast_tensors(first, second)
    except RuntimeError:  # they do not broadcast
        return False
    return guards.equal(mine, theirs, question)


_QUESTIONS = {"scale": "the scales of a site are equal", "mask": "the masks of a site are equal"}


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.dim() else repr(value)
