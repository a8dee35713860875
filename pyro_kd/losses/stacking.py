"""The divergences of a run. Sites of one kind, as the steps of a sequence are, stand in one stack of distributions.

A divergence of small tensors costs its operations, each some microseconds forward and as much backward, and not its arithmetic: so
hundreds of alike sites cost as much as one. Sites that are alone, large, masked, or of another law or divergence than those below are
taken one by one.
"""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import is_validation_enabled
from torch import Tensor

from pyro_kd.divergences import Divergence
from pyro_kd.divergences.log_densities import share_rounded
from pyro_kd.errors import PyroKDError, SupportMismatchError, UnsupportedDivergenceError
from pyro_kd.noise.samplers import unwrapped
from pyro_kd.sites.pairing import SitePair

__all__ = ["Wanted", "totals"]

_LEAST_SITES = 3
_MOST_ELEMENTS = 2**14  # of a site


_MOST_ROUNDED = 1e-3
"""Share of draws at the border of a support from which on an estimate is called biased; rarer ones hardly count."""


class Wanted(NamedTuple):
    """A divergence at a pair of sites, and what its sum is divided by."""

    pair: SitePair
    divergence: Divergence
    divisor: int


def totals(wanted: Sequence[Wanted]) -> list[Tensor]:
    """Each divergence, summed over its plates with scale and mask, and divided: scalar tensors.

    Raises:
        UnsupportedDivergenceError: a pair has no such divergence, or the function returned another shape.
    """
    groups, found = defaultdict[Any, list[int]](list), dict[int, Tensor]()
    for index, item in enumerate(wanted):
        groups[_kind_of(item) or index].append(index)
    for indices in groups.values():
        if len(indices) >= _LEAST_SITES:
            found |= zip(indices, _stacked([wanted[index] for index in indices]).unbind(), strict=True)
        else:
            found |= {index: _alone(wanted[index]) for index in indices}
    return [found[index] for index in range(len(wanted))]


def _alone(item: Wanted) -> Tensor:
    pair = item.pair
    value = _value_at(pair, item.divergence)
    is_plain = pair.mask is None and isinstance(pair.scale, float) and pair.scale == 1.0
    total = (value if is_plain else scale_and_mask(value, pair.scale, pair.mask)).sum()
    return total if item.divisor == 1 else total / item.divisor


def _value_at(pair: SitePair, divergence: Divergence) -> Tensor:
    try:
        value = divergence(pair.p, pair.q, pair.value)
    except UnsupportedDivergenceError as error:
        raise UnsupportedDivergenceError(f"site {pair.name!r}: {error}") from error
    except PyroKDError:
        raise
    except ValueError as error:  # torch's check of values
        raise SupportMismatchError(
            f"site {pair.name!r}: the teacher's draw, of {type(unwrapped(pair.p)).__name__}, is no value that the student's "
            f"{type(unwrapped(pair.q)).__name__} takes ({str(error).splitlines()[0]}). Give the student a distribution over the "
            "same values at this site."
        ) from error
    except (NotImplementedError, KeyError) as error:  # KeyError: a flow without inverse
        raise UnsupportedDivergenceError(
            f"site {pair.name!r}: {type(unwrapped(pair.p)).__name__} and {type(unwrapped(pair.q)).__name__} have no closed form, "
            f"and one has no density to estimate from ({type(error).__name__}: {error}). Use a distribution with log_prob, or a "
            "function d(p, q, value) of your own as divergence or latent_divergence."
        ) from error
    if not isinstance(value, Tensor) or value.shape != getattr(pair.p, "batch_shape", value.shape):
        returned = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}, no tensor"
        raise UnsupportedDivergenceError(
            f"site {pair.name!r}: the divergence returned {returned}, and the site has batch shape "
            f"{tuple(pair.p.batch_shape)}. Sum over the event dimensions {tuple(pair.p.event_shape)} and over no others."
        )
    if is_validation_enabled():
        _warn_of_rounded_draws(pair, divergence, value)
    return value


def _warn_of_rounded_draws(pair: SitePair, divergence: Divergence, found: Tensor) -> None:
    """Say so where draws at the border of a support bias an estimate, as those of a Gamma of tiny concentration, which underflow."""
    is_at_students_draw = divergence.draws_from_student and pair.q.has_rsample
    if divergence.exact is None or is_at_students_draw or share_rounded(pair.p, pair.q, pair.value) < _MOST_ROUNDED:
        return
    if divergence.is_exact(pair.p, pair.q) or not found.any():  # equal laws have equal densities also there
        return
    p, q = (type(unwrapped(fn)).__name__ for fn in (pair.p, pair.q))
    warnings.warn(
        f"site {pair.name!r}: the estimate of {divergence.name} is biased: some of the teacher's draws, of {p}, are rounded to "
        f"the border of their support in {pair.value.dtype}, and their density under the student's {q} is that of the rounded ones. "
        "Bound the parameters away from such extremes, compute in torch.float64, or give both programs a pair of families with a "
        "closed form (docs/distributions.md).",
        stacklevel=2,
    )


def _kind_of(item: Wanted) -> tuple[Any, ...] | None:
    """What items must share to stand in one stack; None for one that stands alone."""
    pair = item.pair
    families = item.divergence.stackable
    if not families or pair.mask is not None or not isinstance(pair.scale, float):
        return None
    p = _law(pair.p, families)
    q = None if p is None else _law(pair.q, p[:1])
    if q is None:
        return None
    return (item.divergence, item.divisor, pair.scale, p, q)


def _law(fn: Any, families: Sequence[Any]) -> tuple[Any, ...] | None:
    """Family, names, types and shape of its parameters, and ranks of its ``to_event``; None for one of other families, or large."""
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
    """The parameters that a distribution was made of."""
    if type(fn) is dist.Normal:
        return "loc", "scale"
    return ("logits",) if "logits" in vars(fn) and fn._param is fn.logits else ("probs",)


def _stacked(items: Sequence[Wanted]) -> Tensor:
    """The totals of items of one kind, shape (items,)."""
    pairs = [item.pair for item in items]
    p, q = _stack([pair.p for pair in pairs]), _stack([pair.q for pair in pairs])
    total = items[0].divergence(p, q, torch.empty(0)).reshape(len(items), -1).sum(-1)  # closed forms take no draw
    factor = pairs[0].scale / items[0].divisor
    return total if factor == 1 else total * factor


def _stack(distributions: Sequence[Any]) -> Any:
    """Distributions of one law as one, in a batch dimension on the left."""
    first = distributions[0]
    if type(first) is dist.Independent:
        base = _stack([fn.base_dist for fn in distributions])
        return dist.Independent(base, first.reinterpreted_batch_ndims, validate_args=False)
    parameters = {name: torch.stack([getattr(fn, name) for fn in distributions]) for name in _names(first)}
    return type(first)(**parameters, validate_args=False)
