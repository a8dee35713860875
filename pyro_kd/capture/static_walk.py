"""The walk through what programs reach: it notes everything that is not a tensor, and keeps live views of it.

It follows attributes, items of containers, closures, defaults, the globals that functions name, and classes. It does not see globals
and classes of installed packages, objects in C++, the state of iterators and generators, attributes of a Python module that code
reaches by a computed name, and the contents of containers and arrays of more than :data:`LARGEST` items. Nothing is chosen by name.

Knows Python objects and modules, but neither graphs nor calls. One table, :data:`_NOTES`, has the method for each type. These methods
call each other, so they are in one file.
"""

import array
import functools
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum
from itertools import chain
from operator import attrgetter, getitem
from typing import Any

import numpy as np
import torch
from pyro.params.param_store import ParamStoreDict
from torch import Tensor, nn

from pyro_kd.capture.code_names import attributes_in, globals_of, imports_of, is_installed, slots_of

__all__ = ["LARGEST", "StaticWalk"]

LARGEST = 1000
"""For containers and arrays with more items, only the number of items is noted."""

_MOST = 50_000
"""The maximum number of values that are noted."""

_PLAIN: Any = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), range, slice),
    *(Enum, np.generic, types.BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
_OPAQUE: Any = (ParamStoreDict, torch.optim.Optimizer, types.CodeType, types.FrameType, types.ModuleType)
_OPAQUE_PACKAGES = (
    *("torch._", "torch.fx.", "torch.utils._", "torch.utils.hooks.", "torch.utils.weak.", "torch.utils.data.dataloader._"),
    *("torch.utils.tensorboard.", "pyro.optim.", "pyro_kd.capture.", "logging.", "threading.", "weakref."),
)
_PARTS = ("_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}
_contents = attrgetter("cell_contents")


class StaticWalk:
    """Goes through what objects reach, and keeps live views of it.

    One pass over all views tells cheaply whether anything has changed: it takes tens of nanoseconds per item.

    Args:
        roots: the objects, by names for messages.
        ignored: paths that are left out.

    Attributes:
        modules, tensors, tokens: as of :class:`~pyro_kd.capture.static_state.StaticState`.
        arrays, sets: arrays and sets, each with a copy of its contents.
        empty: containers that had no items.
    """

    def __init__(self, roots: Mapping[str, Any], ignored: frozenset[str]) -> None:
        self.modules: dict[nn.Module, None] = {}
        self.tensors: list[Tensor] = []
        self.tokens: dict[str, Any] = {}
        self.arrays: list[tuple[Any, bytes]] = []
        self.sets: list[tuple[Any, Any]] = []
        self.empty: list[Any] = []
        self._sized: list[Any] = []
        self._views: list[Any] = []
        self._cells: list[Any] = []
        self._namespaces: list[Mapping[str, Any]] = []
        self._names: list[str] = []
        self._owners: list[Any] = []
        self._attributes: list[str] = []
        self._ignored = ignored
        self._seen: dict[Any, str] = {}
        self._kept: list[Any] = []  # kept alive, so that no id is reused
        self._todo: deque[tuple[str, Any]] = deque(roots.items())
        while self._todo and len(self.tokens) < _MOST:
            path, value = self._todo.popleft()
            if path not in ignored:
                self.tokens[path] = self._token(path, value)

    # What each call compares.

    def lengths(self) -> list[int]:
        """Numbers of items."""
        return list(map(len, self._sized))

    def items(self) -> Iterator[Any]:
        """The objects that are currently in the views."""
        return chain(
            chain.from_iterable(self._views),
            map(_contents, self._cells),
            map(getitem, self._namespaces, self._names),
            map(getattr, self._owners, self._attributes),
        )

    # What is noted, by type.

    def _token(self, path: str, value: Any) -> Any:
        """What tells a value from different ones. Its parts are visited later."""
        cls = type(value)
        if isinstance(value, _PLAIN):
            return cls, value.hex() if isinstance(value, float) else repr(value)
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return Tensor, id(value)
        if id(value) in self._seen:
            return "seen", self._seen[id(value)]
        self._seen[id(value)] = path
        self._kept.append(value)
        if isinstance(value, _OPAQUE) or f"{cls.__module__}.{cls.__qualname__}".startswith(_OPAQUE_PACKAGES):
            return cls, id(value)
        for types_, note in _NOTES:
            if isinstance(value, types_):
                return cls, note(self, path, value)
        return cls, self._object(path, value)

    def _follow(self, path: str, value: Any) -> None:
        self._todo.append((path, value))

    def _module(self, path: str, module: nn.Module) -> Any:
        self.modules[module] = None
        if isinstance(module, torch.jit.ScriptModule):  # its attributes are in C++
            if hasattr(module, "training"):  # one by torch.jit.freeze has no mode
                self._watch_attribute(module, "training")
            for name, inner in module.named_children():
                self._follow(f"{path}.{name}", inner)
            return id(module), getattr(module, "training", None)
        for held in (module._parameters, module._buffers):  # a graph looks their tensors up by name
            self._seen[id(held)] = path
            self._kept.append(held)
            self._size(held)
            for name, tensor in held.items():
                if tensor is None:
                    self._name(f"{path}.{name}", held, name)
        attributes = vars(module)
        for name in _PARTS:  # dictionaries that stay, whatever is in them
            self._follow(f"{path}.{name}", attributes[name])
        names = {name: f"{path}.{name}" for name in attributes if name not in _OF_EVERY_MODULE}
        self._sized.append(attributes)
        self._watch_attribute(module, "__class__")
        self._watch_names(attributes, names)
        self._class_of(path, module)
        return id(module), [(*held,) for held in (module._parameters, module._buffers)]

    def _function(self, path: str, function: types.FunctionType) -> Any:
        self._watch_attribute(function, "__code__")
        for name in ("__defaults__", "__kwdefaults__"):
            if getattr(function, name):
                self._watch_attribute(function, name)
                self._follow(f"{path}.{name}", getattr(function, name))
        code = function.__code__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
                self._follow(f"{path}.{name}", value)
                self._cells.append(cell)
                self._python_module(value, attributes_in(code))
            except ValueError:  # not bound yet
                continue
        if vars(function):
            self._attributes_of(path, vars(function))
        if not is_installed(function.__module__):
            self._globals(function.__globals__, code)
        return code

    def _globals(self, namespace: dict[str, Any], code: types.CodeType) -> None:
        own = namespace.get("__name__")
        for name in globals_of(code) & namespace.keys():
            self._name(f"{own}.{name}", namespace, name)
            self._python_module(namespace[name], attributes_in(code))
        for name in imports_of(code) & sys.modules.keys():
            self._python_module(sys.modules[name], attributes_in(code))

    def _python_module(self, value: Any, names: frozenset[str]) -> None:
        """Note those attributes of a user's Python module that a function names."""
        if isinstance(value, types.ModuleType) and not is_installed(value.__name__):
            for name in names & vars(value).keys():
                self._name(f"{value.__name__}.{name}", vars(value), name)
                self._python_module(vars(value)[name], names - {name})

    def _name(self, path: str, namespace: Mapping[str, Any], name: str) -> None:
        if (id(namespace), name) not in self._seen and path not in self._ignored:
            self._seen[id(namespace), name] = path
            self._kept.append(namespace)
            self._namespaces.append(namespace)
            self._names.append(name)
            self._follow(path, namespace[name])

    def _method(self, path: str, method: types.MethodType) -> Any:
        self._follow(f"{path}.__func__", method.__func__)
        self._follow(path + "()", method.__self__)

    def _partial(self, path: str, partial: Any) -> Any:
        self._follow(f"{path}.func", partial.func)
        self._follow(f"{path}.args", partial.args)
        self._follow(f"{path}.keywords", partial.keywords)
        self._attributes_of(path, vars(partial))

    def _descriptor(self, path: str, value: Any) -> Any:
        for name in ("__func__", "fget"):
            if hasattr(value, name):
                self._follow(f"{path}.{name}", getattr(value, name))

    def _class(self, path: str, cls: type) -> Any:
        if not is_installed(cls.__module__):
            for base in cls.__mro__[1:]:
                if not is_installed(base.__module__):
                    self._follow(f"{base.__module__}.{base.__qualname__}", base)
            self._attributes_of(path, vars(cls))
        return id(cls)

    def _dict(self, path: str, items: dict[Any, Any]) -> Any:
        self._size(items)
        if not items or len(items) > LARGEST:
            return len(items), id(items) if items else 0
        self._views.append(items.keys())
        names = {key: f"{path}[{key!r}]" if isinstance(key, _PLAIN) else f"{path}[{n}]" for n, key in enumerate(items)}
        self._watch_items(items, names)
        for index, key in enumerate(items):
            if not isinstance(key, _PLAIN):
                self._follow(f"{path}.keys[{index}]", key)
        if type(items) is not dict and hasattr(items, "__dict__"):
            self._attributes_of(path, vars(items))
        return tuple(names.values())  # in their order

    def _list(self, path: str, items: Any) -> Any:
        self._size(items)
        if not items or len(items) > LARGEST:
            return len(items), id(items) if items else 0
        self._views.append(items)
        for index, item in enumerate(items):
            self._follow(f"{path}[{index}]", item)
        return len(items)

    def _tuple(self, path: str, items: tuple[Any, ...]) -> Any:
        for index, item in enumerate(items[:LARGEST]):
            self._follow(f"{path}[{index}]", item)
        return len(items)

    def _set(self, path: str, members: Any) -> Any:
        self._size(members)
        if not members or len(members) > LARGEST:
            return len(members), id(members) if members else 0
        self.sets.append((members, frozenset(members)))
        return frozenset((type(member), repr(member) if isinstance(member, _PLAIN) else id(member)) for member in members)

    def _array(self, path: str, items: Any) -> Any:
        if items.size > LARGEST or items.dtype.hasobject:
            return items.shape, id(items)
        self.arrays.append((items, items.tobytes()))
        return items.shape, str(items.dtype), items.tobytes()

    def _bytes(self, path: str, items: Any) -> Any:
        if len(items) > LARGEST:
            return len(items), id(items)
        self.sets.append((items, items[:]))
        return bytes(items)

    def _memory(self, path: str, memory: memoryview) -> Any:
        if memory.nbytes > LARGEST:
            return memory.nbytes, id(memory)
        self.arrays.append((memory, memory.tobytes()))
        return memory.tobytes()

    def _frozen(self, path: str, program: Any) -> Any:
        self._follow(f"{path}.program", program.program)

    def _object(self, path: str, value: Any) -> Any:
        """Note an object of any remaining type: its attributes and its class."""
        cls = type(value)
        slots = [name for base in cls.__mro__ for name in slots_of(base) if hasattr(value, name)]
        for name in slots:
            if f"{path}.{name}" not in self._ignored:
                self._watch_attribute(value, name)
                self._follow(f"{path}.{name}", getattr(value, name))
        if hasattr(value, "__dict__"):
            self._attributes_of(path, vars(value))
        elif not slots:
            return id(value)
        self._class_of(path, value)
        return None

    def _class_of(self, path: str, value: Any) -> None:
        cls = type(value)
        if not is_installed(cls.__module__):
            self._follow(f"{cls.__module__}.{cls.__qualname__}", cls)

    # How it is watched.

    def _size(self, items: Any) -> None:
        (self._sized if items else self.empty).append(items)

    def _watch_attribute(self, owner: Any, name: str) -> None:
        self._owners.append(owner)
        self._attributes.append(name)

    def _attributes_of(self, path: str, attributes: Mapping[str, Any]) -> None:
        names = {name: f"{path}.{name}" for name in attributes}
        self._size(attributes)
        self._watch_items(attributes, names)

    def _watch_items(self, items: Mapping[Any, Any], paths: Mapping[Any, str]) -> None:
        if self._ignored.isdisjoint(paths.values()):
            self._views.append(items.values())
            for key, value in items.items():
                self._follow(paths[key], value)
            return
        self._watch_names(items, paths)

    def _watch_names(self, items: Mapping[Any, Any], paths: Mapping[Any, str]) -> None:
        for key, path in paths.items():
            if path not in self._ignored:
                self._namespaces.append(items)
                self._names.append(key)
                self._follow(path, items[key])


def _is_frozen(value: Any) -> bool:
    return bool(getattr(type(value), "is_frozen", False))


class _FrozenMeta(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return _is_frozen(value)


class _FrozenLike(metaclass=_FrozenMeta):
    """Programs that :func:`pyro_kd.freeze` has copied."""


_NOTES: Any = (
    (_FrozenLike, StaticWalk._frozen),
    (type, StaticWalk._class),
    (nn.Module, StaticWalk._module),
    (types.FunctionType, StaticWalk._function),
    (types.MethodType, StaticWalk._method),
    (functools.partial, StaticWalk._partial),
    ((staticmethod, classmethod, property), StaticWalk._descriptor),
    (dict, StaticWalk._dict),
    ((list, deque), StaticWalk._list),
    (tuple, StaticWalk._tuple),
    ((set, frozenset), StaticWalk._set),
    (np.ndarray, StaticWalk._array),
    (types.MappingProxyType, StaticWalk._dict),
    ((bytearray, array.array), StaticWalk._bytes),
    (memoryview, StaticWalk._memory),
)
