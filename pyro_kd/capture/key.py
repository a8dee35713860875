"""The key of a call: what its arguments and torch's modes fix in a graph. Equal keys share a specialisation.

The key has no shapes: a graph compares the shapes of all its inputs itself. Nor does it have what the programs reach besides their
arguments (:mod:`pyro_kd.capture.static_state`), which has no hash.

Knows arguments, but no programs.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_kd.capture.static_state import StaticState
from pyro_kd.utils.autocast import AutocastModes
from pyro_kd.utils.torch_internals import pytree

__all__ = ["Arguments", "call_key"]

_PLAIN = (Tensor, int, float, str, type(None))
_EXACT = (bool, int, str, bytes, type(None))


@dataclass(frozen=True, slots=True)
class Arguments:
    """Positional and keyword arguments, flattened.

    Attributes:
        leaves: the values in the arguments, in order.
        structure: how to put the arguments together again; None for positional tensors, numbers and strings only.
    """

    leaves: list[Any]
    structure: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Arguments":
        """Flatten arguments."""
        if not kwargs and all(isinstance(arg, _PLAIN) for arg in args):
            return cls(list(args), None)
        return cls(*pytree.tree_flatten((args, kwargs)))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves, of any shapes."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def objects(self) -> dict[str, Any]:
        """The leaves that are neither tensors nor plain values, by names for messages."""
        return {f"argument {n}": leaf for n, leaf in enumerate(self.leaves) if not isinstance(leaf, _PLAIN)}

    def filled(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with their tensors replaced by the given ones, of any shapes. Surplus tensors are ignored."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        if self.structure is None:
            return tuple(leaves), {}
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return args, kwargs

    def values(self) -> tuple[Any, ...]:
        """The values of the leaves that are not tensors, with their types, since True is not 1."""
        return tuple([None if isinstance(leaf, Tensor) else (type(leaf), leaf, _parts(leaf)) for leaf in self.leaves])


def call_key(arguments: Arguments, tensors: Sequence[Tensor], autocast: AutocastModes, static: Hashable) -> tuple[Any, ...]:
    """The key of a call.

    Args:
        arguments: arguments of the programs.
        tensors: the tensors among them, of any shapes.
        autocast: result of :func:`~pyro_kd.utils.autocast.autocast_modes`.
        static: everything else that the run depends on.
    """
    return (
        static,
        arguments.values(),
        _same(tensors),
        arguments.structure,
        repr(arguments.structure),  # {1: x} is no {True: x}
        torch.is_grad_enabled(),
        autocast,
        torch.get_default_dtype(),
    )


def _parts(leaf: Any) -> str:
    """The contents of an argument whose equality may not compare everything: 0.0 is equal to -0.0, {1} to {True}."""
    if type(leaf) is float:
        return leaf.hex()
    if type(leaf) in _EXACT or type(leaf).__eq__ is object.__eq__:  # type: ignore[comparison-overlap]
        return ""
    return repr(StaticState({"": leaf}).tokens)


def _same(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Which arguments are the same tensor: a graph of f(x, x) does not fit f(x, y)."""
    first = dict[int, int]()
    return tuple([first.setdefault(id(tensor), number) for number, tensor in enumerate(tensors)])
