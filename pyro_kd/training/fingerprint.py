"""What objects are made of, as short texts by name: kept in checkpoints, so that a different run does not resume from them.

Numbers and names are described as they are, tensors by a checksum, functions by their compiled code, what they close over and the
globals that they use, objects of the user's own classes by their attributes and methods, and what libraries define by its name. No
description depends on an address, on the order of a set, or on the process. What belongs to a run is decided elsewhere
(:mod:`pyro_kd.training.runs` and the objectives).
"""

import functools
import hashlib
import json
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dis import get_instructions
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.utils import lazy_property
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from pyro_kd.divergences import Divergence
from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.losses import DistillationLoss, SurrogateKD
from pyro_kd.utils.display import describe_tensor
from pyro_kd.utils.torch_internals import parts_of_module

__all__ = ["Fingerprint", "differences", "digest_of"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, torch.dtype, torch.device)
_TRANSPARENT = (Distribution, Transform, Messenger, ELBO, nn.Module)
_LIBRARIES = frozenset({"numpy", "pyro", "pyro_kd", "scipy", "torch"}) | sys.stdlib_module_names
_LONGEST = 80
_MOST = 32
_CODE = "()"
_NOT_DESCRIBED: dict[type, frozenset[str]] = {
    nn.Module: frozenset(vars(nn.Module())) | {"_pyro_context", "_pyro_name"},
    DistillationLoss: frozenset(name for name in vars(SurrogateKD()) if name[0] == "_") | {"compile_options"},
}
"""Attributes by base class that do not change what is trained: what an object has learned, is composed of, or is compiled by."""


class Fingerprint:
    """Descriptions by name of whatever is added.

    Args:
        trained: tensors that change during the run, which are described by their shape.
        modules: the modules that hold them, which are not described.

    Attributes:
        found: the descriptions.
    """

    def __init__(self, trained: Iterable[Tensor] = (), modules: Iterable[nn.Module] = ()) -> None:
        self.found: dict[str, str] = {"python": ".".join(map(str, sys.version_info[:2]))}
        self._trained = set(trained)
        self._students = set(modules)
        self._seen: dict[int, tuple[str, Any]] = {}  # with the object, so that no id is used twice

    def add(self, name: str, value: Any) -> None:
        """Describe a value under this name, and its parts under names that start with it."""
        text = _text(value)
        if text is not None:
            self.found[name] = text
            if isinstance(value, type):
                self._add_class(name, value)
        elif isinstance(value, Tensor):
            self.found[name] = f"{describe_tensor(value)}, trained" if value in self._trained else digest_of(value)
        elif id(value) in self._seen:
            self.found[name] = f"{self._seen[id(value)][0]} again"
        else:
            self._seen[id(value)] = name, value
            self._add_object(name, value)

    def _add_object(self, name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            self._add_parts(name, value, ((f"[{key!r:.60}]", item) for key, item in value.items()))
        elif isinstance(value, list | tuple):
            self._add_parts(name, value, ((f"[{index}]", item) for index, item in enumerate(value)))
        elif isinstance(value, set | frozenset):
            self.found[name] = _short(
                f"{type(value).__name__} {sorted(_text(item) or type(item).__name__ for item in value)}"
            )
        elif isinstance(value, FrozenProgram):
            self.add(name, value.program)
        elif isinstance(value, Divergence):
            self.add(name, value.function)
        elif isinstance(value, types.FunctionType):
            self._add_function(name, value)
        elif isinstance(value, types.MethodType):
            self.add(f"{name}.{value.__func__.__name__}", value.__func__)
            self.add(name, value.__self__)
        elif isinstance(value, functools.partial):
            self._add_parts(name, value, ((".func", value.func), (".args", value.args), (".keywords", value.keywords)))
        elif isinstance(value, nn.Module) and value in self._students:
            self.found[name] = f"{_name_of(type(value))}, trained"
        else:
            self._add_parts(name, value, _attributes(value))
            self._add_class(name, type(value))

    def _add_parts(self, name: str, value: Any, parts: Iterable[tuple[str, Any]]) -> None:
        """Add each part under a name of its own, or all in one text where there are many."""
        parts = list(parts)
        self.found[name] = _name_of(type(value))
        if len(parts) <= _MOST or isinstance(value, nn.Module):
            for suffix, part in parts:
                self.add(name + suffix, part)
            return
        whole = Fingerprint(self._trained, self._students)
        whole._seen = self._seen
        for suffix, part in parts:
            whole.add(suffix, part)
        self.found[name] += f" of {len(parts)}, {_digest(json.dumps(whole.found, sort_keys=True).encode())}"

    def _add_function(self, name: str, fn: types.FunctionType) -> None:
        self.found[name] = _name_of(fn)
        is_library = _is_library(fn.__module__)
        if not is_library:
            self.found[name + _CODE] = _digest(_code(fn.__code__, fn.__doc__).encode())
        defaults = [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
        for index, default in enumerate(defaults):
            self.add(f"{name}{_CODE} default {index}", default)
        for variable, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            try:
                self.add(f"{name} > {variable}", cell.cell_contents)
            except ValueError:
                self.found[f"{name} > {variable}"] = "not bound yet"
        if not is_library and "-packages" not in fn.__code__.co_filename:  # site-packages, dist-packages
            for variable in sorted(_globals(fn.__code__) & fn.__globals__.keys()):
                self.add(f"{name} > {variable}", fn.__globals__[variable])

    def _add_class(self, name: str, kind: type) -> None:
        """Add methods and options of a user's own class, and of the classes that it derives from."""
        for owner in kind.__mro__:
            if _is_library(owner.__module__) or id(owner) in self._seen:
                continue
            self._seen[id(owner)] = f"{name}: {owner.__name__}", owner
            for attribute, value in vars(owner).items():
                for part in _functions(value):
                    self.add(f"{name}: {owner.__name__}.{attribute}", part)
                if not attribute.startswith("__") and (_text(value) is not None or isinstance(value, Tensor | list | dict)):
                    self.add(f"{name}: {owner.__name__}.{attribute}", value)


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between two fingerprints, one text per difference. Compiled code is compared only within one version of Python."""
    is_comparable = then.get("python") == now.get("python")
    names = [name for name in {**then, **now} if name != "python" and (is_comparable or not name.endswith(_CODE))]
    return [_difference(name, then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)]


def _difference(name: str, then: str | None, now: str | None) -> str:
    if name.endswith(_CODE) and then is not None and now is not None:
        return f"{name.removesuffix(_CODE)}: its code has changed"
    return f"{name}: was {then or 'not there'}, is {now or 'not there'}"


def _text(value: Any) -> str | None:
    """A value that is its own description, as text; None for a different value."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        return _short(repr(value))
    if isinstance(value, np.ndarray):
        return f"array of {value.dtype} of shape {value.shape}" + (
            "" if value.dtype.hasobject else f", {_digest(value.tobytes())}"
        )
    if isinstance(value, type | types.BuiltinFunctionType | types.ModuleType):
        return _name_of(value)
    if isinstance(value, list | tuple) and len(value) <= 1000 and all(isinstance(item, _PLAIN) for item in value):
        return _short(repr(value))
    return None


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object that are options or parts of it, not what it has cached."""
    if isinstance(value, nn.Module):
        yield from ((f".{name}", part) for name, part in parts_of_module(value).items())
        yield ".training", value.training
    kind = type(value)
    if _is_library(kind.__module__) and not isinstance(value, _TRANSPARENT) and not kind.__module__.startswith("pyro_kd"):
        return
    skipped = frozenset[str]().union(*(names for base, names in _NOT_DESCRIBED.items() if isinstance(value, base)))
    slots = {name: getattr(value, name) for name in _slots(kind) if hasattr(value, name)}
    for name, part in sorted({**getattr(value, "__dict__", {}), **slots}.items()):
        is_cache = isinstance(getattr(kind, name, None), lazy_property | functools.cached_property)
        if name not in skipped and not is_cache and not (name[0] == "_" and _is_opaque(part)):
            yield f".{name}", part


def _slots(kind: type) -> Iterator[str]:
    for owner in kind.__mro__ if not _is_library(kind.__module__) else ():
        slots = vars(owner).get("__slots__", ())
        yield from (name for name in ((slots,) if isinstance(slots, str) else slots) if not name.startswith("__"))


def _is_opaque(part: Any) -> bool:
    """Whether a private attribute is no option: None, or an object of a library's own class."""
    if isinstance(
        part, Tensor | types.FunctionType | types.MethodType | Mapping | set | frozenset | list | tuple | FrozenProgram
    ):
        return False
    return part is None or (
        _text(part) is None and _is_library(type(part).__module__) and not isinstance(part, _TRANSPARENT)
    )


def _functions(value: Any) -> Iterator[Callable[..., Any]]:
    """The functions that an attribute of a class is made of."""
    inner = (value.fget, value.fset) if isinstance(value, property) else (getattr(value, "__func__", value),)
    yield from (fn for fn in inner if isinstance(fn, types.FunctionType))


def _code(code: types.CodeType, doc: str | None = None) -> str:
    """What a function computes, without its location and its docstring."""
    constants = [
        _code(constant) if isinstance(constant, types.CodeType) else _constant(constant)
        for constant in code.co_consts
        if doc is None or constant != doc
    ]
    return repr((code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, constants))


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _globals(code: types.CodeType) -> Collection[str]:
    """The global names that a function looks up, inner functions included."""
    names = {step.argval for step in get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= set(_globals(constant))
    return names


def _is_library(module: str | None) -> bool:
    return (module or "").split(".")[0] in _LIBRARIES and module != "__main__"


def _name_of(value: Any) -> str:
    name = getattr(value, "__qualname__", getattr(value, "__name__", type(value).__name__))
    module = getattr(value, "__module__", None)
    return name if module in (None, "builtins", "__main__") else f"{module}.{name}"


def digest_of(tensor: Tensor) -> str:
    """Type, shape and a checksum of the values of a tensor of any shape."""
    if tensor.is_meta or isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return "a tensor without values"
    plain = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    values = plain.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{describe_tensor(tensor)}, {_digest(values)}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 20]}... {_digest(text.encode())}"


def _digest(data: Any) -> str:
    return "#" + hashlib.blake2b(data, digest_size=6).hexdigest()
