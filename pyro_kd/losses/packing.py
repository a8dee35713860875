"""Distributions, containers and tensors as a static structure and a list of tensors, and back.

    value --pack--> Structure + [tensors] --unpack--> an equal value on these tensors, or on others in their place

So a run of the teacher can be kept, be an input of a graph, and be written to a file. What two parts of a value share is shared
again: a tensor is one tensor in all places. Knows objects, and no sites.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_kd.utils.transparent import is_transparent, parts_of

__all__ = ["PLAIN", "Held", "Structure", "owned", "pack", "unpack"]

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
"""Types whose values are part of a structure, equal where they are equal."""

Node = tuple[Any, ...]
"""A part of a structure, which has a hash."""


class Held:
    """An object that is no part of a structure's content: it is kept as it is, and equals itself alone."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"Held({type(self.value).__name__})"


class Structure:
    """What :func:`pack` has found besides the tensors. Two of them are equal where all but the tensors' values is equal.

    Attributes:
        node: nested tuples: ``("tensor", number, attributes)``, ``("plain", type, value)``, ``("held", Held)``, ``(list, nodes)``,
            ``(tuple, nodes)``, ``(dict, keys, nodes)``, and ``("object", class, names, nodes)``.
    """

    __slots__ = ("_hash", "node")

    def __init__(self, node: Node) -> None:
        self.node = node
        self._hash = hash(node)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self._hash == other._hash and self.node == other.node)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Structure, (self.node,)  # hashes of texts differ between processes

    def __repr__(self) -> str:
        return f"Structure({self._hash & 0xFFFFFF:06x})"


def pack(value: Any) -> tuple[Structure, list[Tensor]]:
    """Take a value apart.

    Args:
        value: tensors, plain values, tuples, lists, dictionaries, and distributions, transforms and their parts. Anything else, a
            module among them, is held as it is.

    Returns:
        The structure, and the tensors, of any shapes. A tensor that requires a gradient is replaced by a copy without one.
    """
    packer = _Packer()
    return Structure(packer.node(value)), packer.tensors


def unpack(structure: Structure, tensors: Sequence[Tensor]) -> Any:
    """Put a value together again.

    Args:
        structure: of :func:`pack`.
        tensors: those of :func:`pack`, or others in their place, of any shapes.
    """
    return _value(structure.node, tensors)


def owned(value: Any) -> Any:
    """The same value on copies of its tensors, which nobody else writes to."""
    structure, tensors = pack(value)
    return unpack(structure, [tensor.detach().clone() for tensor in tensors])


class _Packer:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._sources: list[Tensor] = []  # which keeps them alive, so that no id is used twice

    def node(self, value: Any) -> Node:
        if isinstance(value, Tensor):
            return self._tensor(value)
        kind = type(value)
        if isinstance(value, PLAIN):
            return ("plain", kind, value)
        if kind is list or kind is tuple:
            return (kind, self._nodes(value))
        if kind is dict and all(isinstance(key, PLAIN) for key in value):
            return (dict, tuple(value), self._nodes(value.values()))
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return ("named", kind, self._nodes(value))
        if isinstance(value, Held):
            return ("held", value)
        if is_transparent(value):
            parts = parts_of(value)
            return ("object", kind, tuple(parts), self._nodes(parts.values()))
        return ("held", Held(value))

    def _nodes(self, values: Iterable[Any]) -> Node:
        return tuple([self.node(value) for value in values])

    def _tensor(self, value: Tensor) -> Node:
        known = self._numbers.get(id(value))
        if known is not None:
            return ("tensor", known, (), ())
        number = self._numbers[id(value)] = len(self.tensors)
        self._sources.append(value)
        self.tensors.append(value.detach().clone() if value.requires_grad else value)
        # A draw carries what it was before it was rounded.
        attributes = {} if isinstance(value, nn.Parameter) else vars(value)
        names = tuple(name for name, part in attributes.items() if isinstance(part, Tensor))
        return ("tensor", number, names, self._nodes(attributes[name] for name in names))


def _value(node: Any, tensors: Sequence[Tensor]) -> Any:
    kind = node[0]
    if kind == "tensor":
        tensor = tensors[node[1]]
        for name, part in zip(node[2], node[3], strict=True):
            setattr(tensor, name, _value(part, tensors))
        return tensor
    if kind == "plain":
        return node[2]
    if kind == "held":
        return node[1].value
    if kind is list or kind is tuple:
        return kind([_value(part, tensors) for part in node[1]])
    values = [_value(part, tensors) for part in node[2 if kind in (dict, "named") else 3]]
    if kind is dict:
        return dict(zip(node[1], values, strict=True))
    if kind == "named":
        return node[1](*values)
    made = node[1].__new__(node[1])
    vars(made).update(zip(node[2], values, strict=True))
    return made
