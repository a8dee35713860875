"""Which part of a law consists of point masses, and which has a density. A KL compares only laws that agree in this.

A point mass is a Delta: plain, inside ``to_event``, ``mask`` or ``expand``, mapped by transforms, or part of a mixture. Every value
of a discrete law is a point mass too. Distributions only.
"""

from enum import Flag
from typing import Any

import pyro.distributions as dist
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution, constraints

__all__ = ["Mass", "is_discrete", "is_point", "mass_of", "point_of", "support_of"]


class Mass(Flag):
    """The parts of a law."""

    POINTS = 1
    DENSITY = 2


def mass_of(fn: Any) -> Mass:
    """The parts of a law. A law that does not tell counts as a density."""
    if isinstance(fn, dist.Delta | dist.Empirical):
        return Mass.POINTS
    if isinstance(fn, td.MixtureSameFamily):
        return mass_of(fn.component_distribution)
    if isinstance(fn, dist.MaskedMixture):
        return mass_of(fn.component0) | mass_of(fn.component1)
    if isinstance(fn, dist.ZeroInflatedDistribution):
        return Mass.POINTS | mass_of(fn.base_dist)
    base = getattr(fn, "__dict__", {}).get("base_dist")
    if isinstance(base, Distribution):
        return mass_of(base)
    return Mass.POINTS if is_discrete(fn) else Mass.DENSITY


def support_of(fn: Any) -> Any:
    """The support of a law as a constraint on single entries of an event; None if the law does not tell."""
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        return None
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def is_discrete(fn: Any) -> bool:
    """Whether the law declares a discrete support."""
    try:
        return bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False


def is_point(fn: Any) -> bool:
    """Whether a law is a single point mass."""
    while not isinstance(fn, dist.Delta):
        if not isinstance(fn, _CARRIERS):
            return False
        fn = fn.base_dist
    return True


def point_of(fn: Any) -> Tensor | None:
    """The value of a law that is a single point mass, of shape ``batch_shape + event_shape``; None for other laws."""
    if isinstance(fn, dist.Delta):
        return fn.v
    if not is_point(fn):
        return None
    value = point_of(fn.base_dist)
    assert value is not None
    if isinstance(fn, td.TransformedDistribution):
        for transform in fn.transforms:
            value = transform(value)
    return value.expand(fn.batch_shape + fn.event_shape)


_CARRIERS = (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution, td.TransformedDistribution)
"""A point mass inside of one of these is a point mass."""
