"""The divergences of a run, computed in stacks.

On small tensors, a divergence costs as much as launching its operations, a few microseconds forward and backward; the arithmetic is
free. So the divergences of similar sites, such as the steps of a sequence, are computed in one stack of distributions. Sites are
computed one by one if there are few of them, if they are large or masked, or if their divergence or family cannot be stacked
(:class:`~pyro_kd.divergences.Divergence`).
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_kd.losses.site_divergence import SiteDivergence, parted

__all__ = ["totals"]

_LEAST_SITES = 3
_MOST_ELEMENTS = 2**14  # of a site


def totals(wanted: Sequence[SiteDivergence]) -> list[tuple[Tensor, ...]]:
    """The totals of each divergence; returns and raises as :meth:`SiteDivergence.totals` does."""
    groups, found = defaultdict[Any, list[int]](list), dict[int, tuple[Tensor, ...]]()
    for index, item in enumerate(wanted):
        groups[_signature(item) or index].append(index)
    for indices in groups.values():
        if len(indices) >= _LEAST_SITES:
            parts = [part.unbind() for part in _stacked([wanted[index] for index in indices])]
            found |= zip(indices, zip(*parts, strict=True), strict=True)
        else:
            found |= {index: wanted[index].totals() for index in indices}
    return [found[index] for index in range(len(wanted))]


def _signature(item: SiteDivergence) -> tuple[Any, ...] | None:
    """Items with equal signatures can be stacked; None if an item cannot be stacked at all."""
    pair = item.pair
    families = item.divergence.stackable
    if not families or pair.mask is not None or not isinstance(pair.scale, float):
        return None
    p = _law(pair.p, families)
    q = None if p is None else _law(pair.q, p[:1])
    if q is None:
        return None
    return (item.divergence, item.divisor, pair.scale, p, q, item.given is None)


def _law(fn: Any, families: Sequence[Any]) -> tuple[Any, ...] | None:
    """Family, names, types and shape of the parameters, and ranks of ``to_event``; None if it is large or not of these families."""
    ranks = []
    while type(fn) is dist.Independent:
        ranks.append(fn.reinterpreted_batch_ndims)
        fn = fn.base_dist
    if type(fn) not in families:
        return None
    names = _names(fn)
    tensors = [getattr(fn, name) for name in names]
    if tensors[0].numel() > _MOST_ELEMENTS:
        return None
    return (type(fn), names, tensors[0].shape, tuple([(x.dtype, x.device) for x in tensors]), tuple(ranks))


def _names(fn: Any) -> tuple[str, ...]:
    """The names of the parameters that a distribution was constructed with."""
    if type(fn) is dist.Normal:
        return "loc", "scale"
    return ("logits",) if "logits" in vars(fn) and fn._param is fn.logits else ("probs",)


def _stacked(items: Sequence[SiteDivergence]) -> list[Tensor]:
    """The totals of items with equal signatures, each of shape (items,)."""
    pairs = [item.pair for item in items]
    p, q = _stack([pair.p for pair in pairs]), _stack([pair.q for pair in pairs])
    value = items[0].divergence(p, q, torch.empty(0))  # closed forms need no draw
    given = [item.given for item in items if item.given is not None]
    parts = parted(value, torch.stack(given).reshape(value.shape)) if given else (value,)
    factor = pairs[0].scale / items[0].divisor
    sums = [part.reshape(len(items), -1).sum(-1) for part in parts]
    return sums if factor == 1 else [total * factor for total in sums]


def _stack(distributions: Sequence[Any]) -> Any:
    """Distributions of one family and shape as a single one, with a new batch dimension on the left."""
    first = distributions[0]
    if type(first) is dist.Independent:
        base = _stack([fn.base_dist for fn in distributions])
        return dist.Independent(base, first.reinterpreted_batch_ndims, validate_args=False)
    parameters = {name: torch.stack([getattr(fn, name) for fn in distributions]) for name in _names(first)}
    return type(first)(**parameters, validate_args=False)
