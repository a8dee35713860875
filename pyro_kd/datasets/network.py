"""Discrete Bayesian networks as tables of probabilities. Knows no file format, and no program."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from pyro_kd.errors import listing, nearest

__all__ = ["DiscreteNetwork"]

_ROUNDING = 1e-6  # the most by which probabilities may fail to add up to 1


@dataclass(frozen=True, slots=True, eq=False)
class DiscreteNetwork:
    r"""A Bayesian network of discrete nodes: :math:`p(x) = \prod_i p(x_i | x_{Pa(i)})`.

    Attributes:
        states: names of the states of each node, by the node's name. The nodes stand in topological order: parents come first.
        parents: names of the parents of each node.
        tables: probabilities of each node given its parents, of shape (states of the first parent, ..., states of the node).

    Raises:
        ValueError: the three do not fit together, a parent does not come before its child, or probabilities do not add up to 1.

    Example:
        >>> import torch
        >>> from pyro_kd.datasets import DiscreteNetwork
        >>> network = DiscreteNetwork(
        ...     states={"rain": ("yes", "no"), "wet": ("yes", "no")},
        ...     parents={"rain": (), "wet": ("rain",)},
        ...     tables={"rain": torch.tensor([0.2, 0.8]), "wet": torch.tensor([[0.9, 0.1], [0.0, 1.0]])},
        ... )
        >>> network.names, network.leaves
        (('rain', 'wet'), ('wet',))
    """

    states: Mapping[str, tuple[str, ...]]
    parents: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not tuple(self.states) == tuple(self.parents) == tuple(self.tables):
            raise ValueError(
                f"states, parents and tables must have the same nodes in the same order, not {listing(self.states)}; "
                f"{listing(self.parents)}; {listing(self.tables)}"
            )
        seen: set[str] = set()
        for name, parents in self.parents.items():
            for parent in parents:
                if parent not in seen:
                    raise ValueError(
                        f"{parent!r} is a parent of {name!r}, and must come before it in the order of the nodes"
                    )
            shape = tuple(len(self.states[node]) for node in (*parents, name))
            table = self.tables[name]
            if table.shape != shape or not table.is_floating_point():
                raise ValueError(
                    f"the table of {name!r} must hold numbers of shape {shape}, one for each state of "
                    f"{listing((*parents, name))}, and is {table.dtype} of shape {tuple(table.shape)}"
                )
            if not ((table >= 0).all() and ((table.sum(-1) - 1).abs() <= _ROUNDING).all()):
                raise ValueError(
                    f"the probabilities of {name!r} must be at least 0 and add up to 1 for each state of its parents"
                )
            seen.add(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes in topological order."""
        return tuple(self.states)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The nodes without children."""
        inner = {parent for parents in self.parents.values() for parent in parents}
        return tuple(name for name in self.names if name not in inner)

    @property
    def num_parameters(self) -> int:
        """The free numbers of all tables: one less than there are states, for each state of the parents."""
        return sum(math.prod(table.shape[:-1]) * (table.shape[-1] - 1) for table in self.tables.values())

    def ancestral(self, names: Collection[str]) -> "DiscreteNetwork":
        """The network of these nodes and their ancestors. They have the same joint law in it.

        Raises:
            ValueError: there is no such node.
        """
        for name in names:
            if name not in self.states:
                raise ValueError(
                    f"there is no node {name!r}.{nearest(name, self.states)} The network has {listing(self.names)}"
                )
        kept = set(names)
        for name in reversed(self.names):
            if name in kept:
                kept.update(self.parents[name])
        order = [name for name in self.names if name in kept]
        return DiscreteNetwork(
            {name: self.states[name] for name in order},
            {name: self.parents[name] for name in order},
            {name: self.tables[name] for name in order},
        )
