"""The arguments of a program: which become inputs of a graph, and which tell the number of rows.

Every tensor among the arguments is an input. Whatever has the number of rows as a size, or is that number, grows with it. Knows
nested arguments and tensors; no programs and no graphs.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_kd.errors import UnsupportedExportError
from pyro_kd.export.description import ROWS, Shape, Value
from pyro_kd.utils.torch_internals import pytree

__all__ = ["Arguments", "dtype_name"]


class Arguments:
    """The arguments of a call, for any number of rows.

    Args:
        program: what is called; its signature names the arguments.
        args, kwargs: an example of what it is called with.
        rows: the number of rows in the example; None if nothing grows.

    Attributes:
        rows: as given.
        tensors: the tensors among the arguments, of any shapes, by name.
    """

    def __init__(
        self, program: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], rows: int | None
    ) -> None:
        self.rows = rows
        self._leaves, self._tree = pytree.tree_flatten((tuple(args), dict(kwargs)))
        paths = [path for path, _ in pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0]]
        self._names = _unique([_name(program, path) for path in paths])
        for name, leaf in zip(self._names, self._leaves, strict=True):
            if _holds_numbers(leaf):
                raise UnsupportedExportError(
                    f"argument {name!r} is or holds an array or tensor inside of a {type(leaf).__name__}, which would be a constant "
                    "of the graph. Pass tensors, or lists, tuples and dictionaries of them, and make the object in the program."
                )
        self.tensors = {name: leaf for name, leaf in zip(self._names, self._leaves, strict=True) if isinstance(leaf, Tensor)}

    @property
    def growing(self) -> list[str]:
        """The names of the arguments that grow with the number of rows."""
        return [name for name, leaf in zip(self._names, self._leaves, strict=True) if self._grows(leaf)]

    def call(self, rows: Any, tensors: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments of a call.

        Args:
            rows: the number of rows, which may be a symbol of a graph.
            tensors: the tensors among the arguments, by name.
        """
        leaves = [
            tensors[name] if name in self.tensors else rows if self._grows(leaf) else leaf
            for name, leaf in zip(self._names, self._leaves, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._tree)
        return args, kwargs

    def resized(self, rows: int) -> dict[str, Tensor]:
        """Copies of the example's tensors with another number of rows: those of the example in turn, again and again."""
        return {name: self._resized(tensor, rows).clone() for name, tensor in self.tensors.items()}

    def values(self) -> tuple[Value, ...]:
        """The tensors as inputs."""
        return tuple(Value(name, self.shape(tensor), dtype_name(tensor)) for name, tensor in self.tensors.items())

    def shape(self, tensor: Tensor) -> Shape:
        """The shape of a tensor, with a symbol for each size that is the number of rows."""
        return tuple(ROWS if size == self.rows else int(size) for size in tensor.shape)

    def _grows(self, leaf: Any) -> bool:
        if self.rows is None:
            return False
        if isinstance(leaf, Tensor):
            return self.rows in leaf.shape
        return type(leaf) is int and leaf == self.rows

    def _resized(self, tensor: Tensor, rows: int) -> Tensor:
        for dim, size in enumerate(tensor.shape):
            if size == self.rows:
                tensor = tensor.index_select(dim, torch.arange(rows, device=tensor.device) % size)
        return tensor


def _holds_numbers(leaf: Any) -> bool:
    """Whether an argument that is no tensor holds some: modules and functions aside, whose tensors are weights."""
    if isinstance(leaf, Tensor | torch.nn.Module | type) or leaf is None or callable(leaf):
        return False
    return isinstance(leaf, np.ndarray) or any(isinstance(item, Tensor | np.ndarray) for item in _attributes_of(leaf))


def _attributes_of(value: Any) -> list[Any]:
    """The attributes of an object."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]


def dtype_name(tensor: Tensor) -> str:
    """The name of a tensor's data type, such as ``float32``."""
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.dtype.is_complex or name.startswith(("q", "float8")):
        raise UnsupportedExportError(f"tensors of type {name} cannot be exported: use real numbers or integers")
    return name


def _name(program: Callable[..., Any], path: Sequence[Any]) -> str:
    """The name of a leaf of ``(args, kwargs)``: the parameter of the program, and the way inside of it."""
    keys: list[Any] = [getattr(key, "idx", getattr(key, "key", getattr(key, "name", None))) for key in path]
    kind, first, *rest = keys
    if kind == 0:
        try:
            names = [
                name
                for name, parameter in inspect.signature(_signed(program)).parameters.items()
                if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
            ]
        except (TypeError, ValueError):
            names = []
        first = names[first] if first < len(names) else f"arg{first}"
    return ".".join(map(str, [first, *rest]))


def _signed(program: Any) -> Any:
    """The callable whose signature names the arguments."""
    while True:
        inner = getattr(program, "program", None)  # of a frozen program
        if inner is None or not callable(inner):
            break
        program = inner
    if isinstance(program, torch.nn.Module):
        return program.forward
    return program


def _unique(names: Sequence[str]) -> list[str]:
    """The names, with a number behind each that has occurred before."""
    found: list[str] = []
    for name in names:
        number, new = 1, name
        while new in found:
            number += 1
            new = f"{name}_{number}"
        found.append(new)
    return found
