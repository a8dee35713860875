"""Deep copies that also copy what functions hold, through which a program may reach its parameters.

``copy.deepcopy`` does not copy functions, refuses tensors that are results of a computation, and fails if one
object in a graph cannot be copied. A :class:`Copier` follows closures, defaults and globals of functions, detaches every
tensor, and shares what cannot be copied. Knows nothing of Pyro but the parameter store, which it leaves alone.
"""

import copyreg
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from pyro.params.param_store import ParamStoreDict
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from pyro_kd.errors import InvalidProgramError
from pyro_kd.utils.pyro_internals import BoundPartial

__all__ = ["Copier", "is_library"]

_LIBRARIES = frozenset({"builtins", "functools", "math", "numpy", "pyro", "pyro_kd", "random", "scipy", "torch"})
_ATOMIC = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type, types.ModuleType, types.BuiltinFunctionType,
    types.CodeType, property, weakref.ref, torch.dtype, torch.device, torch.Generator, ParamStoreDict,
)  # fmt: skip


class Copier:
    """Copies each object once: what objects share, their copies share too.

    Attributes:
        frozen: the frozen programs that were met. They are shared with the originals.
    """

    def __init__(self) -> None:
        self.frozen: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._originals: list[Any] = []  # kept alive, so that no id is used twice

    def copy(self, value: Any) -> Any:
        """Return a copy of ``value``, or ``value`` itself if there is nothing to copy or it cannot be copied."""
        if isinstance(value, _ATOMIC):
            return value
        if getattr(type(value), "is_frozen", False):
            if value not in self.frozen:
                self.frozen.append(value)
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, UninitializedParameter | UninitializedBuffer):
            raise InvalidProgramError(
                f"cannot copy {type(value).__name__}: a lazily initialised module has no values yet. Run the model once before "
                "freeze(model)."
            )
        if isinstance(value, Tensor):
            return self._remember(value, _copy_tensor(value))
        if isinstance(value, types.FunctionType):
            return self._copy_function(value)
        if isinstance(value, types.MethodType):
            return self._remember(value, types.MethodType(self.copy(value.__func__), self.copy(value.__self__)))
        if type(value) is tuple:
            return self._remember(value, tuple(self.copy(item) for item in value))
        if type(value) in (set, frozenset):
            return self._remember(value, type(value)(self.copy(item) for item in value))
        if type(value) is list:
            items: list[Any] = self._remember(value, [])
            items.extend(self.copy(item) for item in value)
            return items
        if type(value) is dict:
            entries: dict[Any, Any] = self._remember(value, {})
            entries.update((self.copy(key), self.copy(item)) for key, item in value.items())
            return entries
        if type(value) is BoundPartial:  # a program under a Pyro handler
            return self._remember(value, BoundPartial(self.copy(value.func)))
        if type(value) is functools.partial:
            args, keywords = self.copy(value.args), self.copy(value.keywords)
            return self._remember(value, functools.partial(self.copy(value.func), *args, **keywords))
        return self._copy_object(value)

    def has_copied(self, value: Any) -> bool:
        """Whether this object has been copied."""
        return self._memo.get(id(value), value) is not value

    def tensors(self, *, trainable: bool = False) -> list[Tensor]:
        """The copied tensors; if ``trainable``, only those whose originals require gradients."""
        pairs = ((original, self._memo[id(original)]) for original in self._originals if isinstance(original, Tensor))
        return [copied for original, copied in pairs if original is not copied and (original.requires_grad or not trainable)]

    def modules(self) -> list[nn.Module]:
        """The copied modules."""
        pairs = ((original, self._memo[id(original)]) for original in self._originals if isinstance(original, nn.Module))
        return [copied for original, copied in pairs if original is not copied]

    def _remember(self, original: Any, copied: Any) -> Any:
        self._originals.append(original)
        self._memo[id(original)] = copied
        return copied

    def _copy_function(self, fn: types.FunctionType) -> types.FunctionType:
        if is_library(fn.__module__) and fn.__closure__ is None:
            return fn
        cells = None if fn.__closure__ is None else tuple(types.CellType() for _ in fn.__closure__)
        new = types.FunctionType(fn.__code__, dict(fn.__globals__), fn.__name__, None, cells)
        self._remember(fn, new)  # before its contents: functions may refer to themselves and to each other
        new.__defaults__ = self.copy(fn.__defaults__)
        new.__kwdefaults__ = self.copy(fn.__kwdefaults__)
        for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
            setattr(new, name, getattr(fn, name))
        vars(new).update((key, self.copy(value)) for key, value in vars(fn).items())
        for old_cell, new_cell in zip(fn.__closure__ or (), new.__closure__ or (), strict=True):
            if not _is_empty(old_cell):
                new_cell.cell_contents = self.copy(old_cell.cell_contents)
        for name in _names(fn.__code__) & fn.__globals__.keys():
            new.__globals__[name] = self.copy(fn.__globals__[name])
        return new

    def _copy_object(self, value: Any) -> Any:
        """Any other object, by the protocol of pickle and copy."""
        try:
            if hasattr(value, "__deepcopy__"):  # such as TorchScript modules
                with torch.no_grad():
                    return self._remember(value, value.__deepcopy__({}))
            reducer: Callable[..., Any] | None = copyreg.dispatch_table.get(type(value))
            reduced = reducer(value) if reducer is not None else value.__reduce_ex__(4)
            if isinstance(reduced, str):
                return self._remember(value, value)  # a global, given by its name
            function, arguments, state, items, entries = (*reduced, None, None, None)[:5]
            new = function(*(self.copy(argument) for argument in arguments))
        except InvalidProgramError:
            raise
        except Exception:  # locks, files, generators and other resources are shared
            return self._remember(value, value)
        self._remember(value, new)
        if state is not None:
            self._set_state(new, self.copy(state))
        for item in items or ():
            new.append(self.copy(item))
        for key, entry in entries or ():
            new[self.copy(key)] = self.copy(entry)
        return new

    @staticmethod
    def _set_state(new: Any, state: Any) -> None:
        if hasattr(new, "__setstate__"):
            new.__setstate__(state)
            return
        slots = None
        if isinstance(state, tuple) and len(state) == 2:
            state, slots = state
        if state is not None:
            vars(new).update(state)
        for name, entry in (slots or {}).items():
            object.__setattr__(new, name, entry)


def _copy_tensor(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copied, requires_grad=False)
    return copied


def is_library(module: str | None) -> bool:
    """Whether a Python module, given by name, is a library that programs are written with."""
    return (module or "").split(".")[0] in _LIBRARIES


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True  # the name is not bound yet
    return False


def _names(code: types.CodeType) -> set[str]:
    """The global names that a function's code uses, inner functions included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names
