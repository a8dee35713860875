"""The distribution that an index chooses from a list, row by row. Knows distributions and no programs."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, transform_to

__all__ = ["Chosen", "choose", "pick"]

_PARAMETERS: dict[type, tuple[str, ...]] = {
    dist.Normal: ("loc", "scale"),
    dist.LogNormal: ("loc", "scale"),
    dist.Laplace: ("loc", "scale"),
    dist.Gamma: ("concentration", "rate"),
    dist.Poisson: ("rate",),
    dist.Bernoulli: ("logits",),
    dist.Categorical: ("logits",),
}
"""Families of which one is chosen by its parameters, so that the KL keeps its closed form."""


def choose(index: Tensor, components: Sequence[Any]) -> Any:
    """The distribution that is, in each row, the component with the number of that row.

    Args:
        index: numbers of components; its shape broadcasts with their batch shape.
        components: distributions with the same event shape.

    Returns:
        One of the same family, if all components have a family whose parameters can be chosen; else a :class:`Chosen`.
    """
    first = components[0]
    families = {type(component) for component in components}
    if families == {dist.Independent} and len({fn.reinterpreted_batch_ndims for fn in components}) == 1:
        rank = first.reinterpreted_batch_ndims
        return choose(index.reshape(index.shape + (1,) * rank), [fn.base_dist for fn in components]).to_event(rank)
    names = _PARAMETERS.get(type(first))
    if len(families) > 1 or names is None or len({fn._param.shape[-1:] for fn in components if hasattr(fn, "_param")}) > 1:
        return Chosen(index, components)
    rank = int(type(first) is dist.Categorical)
    chosen = {name: pick(index, [getattr(fn, name) for fn in components], rank) for name in names}
    return type(first)(**chosen, validate_args=False)


def pick(index: Tensor, values: Sequence[Tensor], event_dim: int = 0) -> Tensor:
    """The values with the number of each row.

    Args:
        index: its shape broadcasts with the batch shape of the values.
        values: tensors of shape ``batch_shape + event_shape``.
        event_dim: the number of dimensions of ``event_shape``.

    Returns:
        Of shape ``batch_shape + event_shape``, where ``batch_shape`` is broadcast with the index.
    """
    stacked = torch.stack(torch.broadcast_tensors(*values), -1)
    index = index.reshape(index.shape + (1,) * event_dim)
    shape = torch.broadcast_shapes(index.shape, stacked.shape[:-1])
    stacked = stacked.expand(*shape, len(values))
    return stacked.gather(-1, index.to(stacked.device).expand(shape).unsqueeze(-1)).squeeze(-1)


class Chosen(TorchDistribution):
    """One component of a list in each row, of any families with one event shape.

    Args:
        index: numbers of components, of a shape that broadcasts with their batch shape.
        components: distributions with the same event shape.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, index: Tensor, components: Sequence[Any]) -> None:
        self.index = index
        self.components = list(components)
        batch_shape = torch.broadcast_shapes(index.shape, *[fn.batch_shape for fn in self.components])
        super().__init__(batch_shape, self.components[0].event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the components, if it is the same in all; else what is in the support of one of them."""
        first, *others = [fn.support for fn in self.components]
        return first if all(_is_same(first, other) for other in others) else _Union([first, *others])

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Chosen":
        """The distribution with a larger batch shape."""
        shape = torch.Size(batch_shape)
        return Chosen(self.index.expand(shape), [fn.expand(shape) for fn in self.components])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw from all components, and take the values of those chosen."""
        shape = torch.Size(sample_shape)
        values = [fn.expand(self.batch_shape).sample(shape) for fn in self.components]
        return pick(self.index, values, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of those chosen, of shape ``batch_shape``. The others may have no density at the value."""
        return pick(self.index, [_log_prob(fn, value) for fn in self.components])


class _Union(constraints.Constraint):
    """What fulfils one of several constraints."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.is_discrete = all(part.is_discrete for part in self.parts)
        self.event_dim = self.parts[0].event_dim
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each event fulfils one of them."""
        found: Tensor = self.parts[0].check(value)
        for part in self.parts[1:]:
            found = found | part.check(value)
        return found


def _is_same(first: Any, second: Any) -> bool:
    """Whether two constraints are one, or of one kind with equal numbers as bounds."""
    if first is second or type(first) is not type(second):
        return first is second
    bounds = [*vars(first).values(), *vars(second).values()]
    return not any(isinstance(bound, Tensor) for bound in bounds) and vars(first) == vars(second)


def _log_prob(fn: Any, value: Tensor) -> Tensor:
    """The log density, which is -inf outside of the support, with gradient 0."""
    support = fn.support
    point = None if support is None else _point_in(support, value)
    if point is None:
        density: Tensor = fn.log_prob(value)
        return density
    inside = support.check(value)
    density = fn.log_prob(torch.where(inside.reshape([*inside.shape, *[1] * support.event_dim]), value, point))
    return torch.where(inside, density, -torch.inf)


def _point_in(support: Any, like: Tensor) -> Tensor | None:
    """A point of a support, of the shape of a value; None where none is known."""
    zeros = torch.zeros_like(like)
    if support.is_discrete:
        low = 0 if support is constraints.boolean else getattr(support, "lower_bound", None)
        return None if low is None else zeros + low
    try:
        point: Tensor = transform_to(support)(zeros)
    except NotImplementedError:
        return None
    return point if point.shape == like.shape else None
