"""What a program reaches: the modules and tensors that it may use, and the names in its code.

A program uses networks that it holds itself, that the closure, defaults or globals of a function hold, or that these hold in turn.
:class:`~pyro_kd.isolation.copying.Copier` follows the same paths to copy what it finds. :class:`Reached` only looks, but
also into the classes of objects. No program is run, so what a run creates is not found.
"""

import dis
import functools
import gc
import random
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from pyro.params.param_store import ParamStoreDict
from torch import Tensor, nn

from pyro_kd.isolation.copying import is_library

__all__ = ["Reached"]

_ATOMIC = (
    type(None), bool, int, float, complex, str, bytes, bytearray, range, slice, types.BuiltinFunctionType, types.CodeType,
    types.FrameType, types.TracebackType, weakref.ref, torch.dtype, torch.device, torch.Generator, ParamStoreDict,
)  # fmt: skip
Generator = random.Random | np.random.Generator | np.random.RandomState
_ATOMS = frozenset(_ATOMIC)  # quicker to look up
_CONTAINERS = frozenset({dict, list, tuple, set, frozenset, OrderedDict})
_Way = tuple[str, ...]


class Reached:
    """The modules and tensors that programs reach.

    Attributes:
        modules: each module with its name, the path to it from its program, such as ``encoder.0`` for a closure's ``encoder``.
        tensors: the tensors outside of modules with their names.
        generators: random generators of Python and NumPy with their names.
        functions: functions of the programs' own code.
        words: names of variables, attributes and keywords in the programs' own code.
    """

    def __init__(self, *programs: Any) -> None:
        self.modules: dict[nn.Module, str] = {}
        self.tensors: dict[Tensor, str] = {}
        self.generators: dict[Generator, str] = {}
        self.functions: set[types.FunctionType] = set()
        self.words: set[str] = set()
        self._seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is used twice
        self._queue: list[tuple[Any, _Way]] = [(program, ()) for program in programs]
        for value, way in self._queue:  # it grows during the loop: the nearest come first, so that names are short
            self._visit(value, way)
        del self._queue, self._seen

    @property
    def roots(self) -> dict[nn.Module, str]:
        """The modules that are not part of another module."""
        inner = {part for module in self.modules for part in _parts(module)}
        return {module: name for module, name in self.modules.items() if module not in inner}

    def parameters(self) -> dict[Tensor, str]:
        """The leaf tensors that require gradients, with their names: those of modules, and others."""
        return {tensor: name for tensor, name in self.all_tensors().items() if tensor.requires_grad and tensor.is_leaf}

    def all_tensors(self) -> dict[Tensor, str]:
        """Parameters and buffers of modules, and other tensors, with their names."""
        found: dict[Tensor, str] = {}
        for module, name in self.modules.items():
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                found.setdefault(tensor, f"{name}.{key}" if name else key)
        for tensor, name in self.tensors.items():
            found.setdefault(tensor, name)
        return found

    @property
    def differentiates(self) -> bool:
        """Whether the programs seem to differentiate tensors that they make themselves, so that they need autograd to run."""
        return not self.words.isdisjoint(("requires_grad", "requires_grad_"))

    def _add(self, value: Any, way: _Way) -> None:
        kind = type(value)
        if kind in _ATOMS or (kind in _CONTAINERS and not value):
            return
        if id(value) not in self._seen and not isinstance(value, _ATOMIC):
            self._seen[id(value)] = value
            self._queue.append((value, way))

    def _visit(self, value: Any, way: _Way) -> None:
        if getattr(type(value), "is_frozen", False) or isinstance(value, types.ModuleType):
            return
        if isinstance(value, Tensor):
            self.tensors[value] = ".".join(way)
        elif isinstance(value, Generator):
            self.generators[value] = ".".join(way)
        elif isinstance(value, type):
            self._visit_class(value, way)
        elif isinstance(value, types.FunctionType):
            self._visit_function(value, way)
        elif isinstance(value, dict):
            if "__builtins__" not in value:  # otherwise a Python module's
                for key, item in list(value.items()):
                    self._add(key, way)
                    self._add(item, (*way, str(key)) if isinstance(key, str | int) else way)
            self._visit_attributes(value, way)
        elif isinstance(value, list | tuple | set | frozenset):
            for index, item in enumerate(value):
                self._add(item, (*way, str(index)))
            self._visit_attributes(value, way)
        elif isinstance(value, nn.Module):
            self._visit_module(value, way)
        else:
            self._visit_attributes(value, way)
            for item in gc.get_referents(value):  # slots, bound methods, partials, iterators, caches
                if item is not getattr(value, "__dict__", None):
                    self._add(item, way)

    def _visit_module(self, module: nn.Module, way: _Way) -> None:
        self.modules[module] = ".".join(way)
        for name, part in module.named_children():
            self._add(part, (*way, name))
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            self._seen[id(tensor)] = tensor  # the module's own
        for name, item in vars(module).items():
            if name not in _OWN:
                self._add(item, (*way, name))
        self._add(type(module), way)

    def _visit_attributes(self, value: Any, way: _Way) -> None:
        for name, item in list(getattr(value, "__dict__", {}).items()):
            self._add(item, (*way, name))
        self._add(type(value), way)

    def _visit_function(self, fn: types.FunctionType, way: _Way) -> None:
        if not _is_library(fn):
            self.functions.add(fn)
            self.words |= _words(fn.__code__)
            if not _is_installed(fn.__module__):
                for name in _globals_used(fn.__code__):
                    if name in fn.__globals__:
                        self._add_global(fn.__globals__[name], fn, name)
        elif fn.__closure__ is None:
            return
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            for item in gc.get_referents(cell):  # none where the name is not bound yet
                self._add(item, (*way, name))
        for item in (fn.__defaults__, fn.__kwdefaults__, fn.__dict__):
            self._add(item, way)

    def _add_global(self, value: Any, fn: types.FunctionType, name: str) -> None:
        """A global of a function; if it is one of the user's own Python modules, what the function takes from it."""
        if isinstance(value, types.ModuleType):
            if not is_library(value.__name__) and not _is_installed(value.__name__):
                for inner in _words(fn.__code__) & vars(value).keys():
                    self._add(vars(value)[inner], (name, inner))
        else:
            self._add(value, (name,))

    def _visit_class(self, cls: type, way: _Way) -> None:
        """The methods and attributes of a class, which its objects share."""
        if _is_library(cls) or cls.__module__ == "builtins":
            return
        for base in cls.__bases__:
            self._add(base, way)
        if _is_installed(cls.__module__):
            self.words |= _words_of_class(cls)
            return
        for name, item in list(vars(cls).items()):
            if isinstance(item, property | functools.cached_property):
                item = getattr(item, "fget", None) or getattr(item, "func", None)
            elif isinstance(item, staticmethod | classmethod):
                item = item.__func__
            if not name.startswith("__") or isinstance(item, types.FunctionType):
                self._add(item, (*way, name))


_OWN = frozenset({"_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"})
"""The attributes in which a module holds its tensors and parts."""


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    modules = module.modules()
    next(modules)
    return modules


def _is_library(definition: Any) -> bool:
    return is_library(getattr(definition, "__module__", None))


@functools.cache
def _is_installed(name: str | None) -> bool:
    """Whether a Python module is a third party's or the standard library's. Its globals are not part of a program."""
    module = sys.modules.get(name or "")
    file = getattr(module, "__file__", None) or ""
    return (
        "site-packages" in file
        or "dist-packages" in file
        or (name or "").split(".")[0] in sys.stdlib_module_names - {"__main__"}
    )


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and the code of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _per_code(find: Callable[[types.CodeType], frozenset[str]]) -> Callable[[types.CodeType], frozenset[str]]:
    """Remember what was found in a code object, as long as that lives."""
    found: weakref.WeakKeyDictionary[types.CodeType, frozenset[str]] = weakref.WeakKeyDictionary()

    @functools.wraps(find)
    def remembered(code: types.CodeType) -> frozenset[str]:
        if code not in found:
            found[code] = find(code)
        return found[code]

    return remembered


@_per_code
def _globals_used(code: types.CodeType) -> frozenset[str]:
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    return frozenset(step.argval for inner in _codes(code) for step in dis.get_instructions(inner) if step.opname in loads)


@_per_code
def _words(code: types.CodeType) -> frozenset[str]:
    """The names of globals, attributes and keywords that a code object uses."""
    words: set[str] = set()
    for inner in _codes(code):
        words.update(inner.co_names)
        for constant in inner.co_consts:
            if isinstance(constant, tuple):  # the names of a call's keywords
                words.update(item for item in constant if isinstance(item, str))
            elif isinstance(constant, str) and constant.isidentifier():  # getattr(module, "training")
                words.add(constant)
    return frozenset(words)


@functools.cache
def _words_of_class(cls: type) -> frozenset[str]:
    functions = [item for item in vars(cls).values() if isinstance(item, types.FunctionType)]
    return frozenset().union(*(_words(fn.__code__) for fn in functions))
