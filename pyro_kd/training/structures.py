"""The structure of a packed value as JSON, and back: the part of a cache's files that is no tensor.

Nothing is unpickled or imported by a name from a file. A class comes from a fixed list, the distributions, transforms and constraints
of torch, Pyro and this package, and an object is made of its attributes, which are data. :mod:`pyro_kd.training.draw_checks` then
decides whether these belong together.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from pyro.distributions.distribution import Distribution as PyroDistribution
from pyro.ops.gamma_gaussian import GammaGaussian
from pyro.ops.gaussian import AffineNormal, Gaussian
from torch import nn
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint

from pyro_kd.losses.kept_runs import KeptNoise, KeptRun, KeptSite
from pyro_kd.losses.packing import Structure
from pyro_kd.utils.pyro_internals import Subsample

__all__ = ["UnknownPartError", "decoded", "encoded"]

_MODULES = ("torch.distributions.", "pyro.distributions.", "pyro_kd.teachers.")
_RECORDS = {kind.__name__: kind for kind in (KeptRun, KeptSite, KeptNoise)}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class UnknownPartError(Exception):
    """Something cannot be written.

    Args:
        what: it.
        site: the name of the site whose part it is; None outside of sites.
    """

    def __init__(self, what: str, site: str | None) -> None:
        super().__init__(what)
        self.what = what
        self.site = site


def encoded(structure: Structure) -> Any:
    """What JSON can hold.

    Raises:
        UnknownPartError: a part of the value is neither plain nor of a class on the list.
    """
    return _encoded(structure.node, None)


def decoded(value: Any, num_tensors: int) -> Structure:
    """The structure that was encoded.

    Args:
        value: what JSON has read.
        num_tensors: how many tensors belong to it.

    Raises:
        ValueError: the value was not made by :func:`encoded`, for this number of tensors.
    """
    used = set[int]()
    try:
        node = _decoded(value, used)
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError, RecursionError) as error:
        raise ValueError(f"no structure of a value ({type(error).__name__}: {error})") from error
    if used != set(range(num_tensors)):
        raise ValueError(f"a structure of {len(used)} tensors, and there are {num_tensors}")
    return Structure(node)


def _encoded(node: Any, site: str | None) -> Any:
    kind = node[0]
    if kind == "tensor":
        return ["tensor", node[1], list(node[2]), _all_encoded(node[3], site)]
    if kind == "plain":
        return _encoded_plain(node[2], site)
    if kind is list or kind is tuple:
        return [kind.__name__, _all_encoded(node[1], site)]
    if kind is dict:
        return ["dict", [_encoded_plain(key, site) for key in node[1]], _all_encoded(node[2], site)]
    if kind == "named" and node[1].__name__ in _RECORDS:
        if node[1] is KeptSite:
            site = node[2][0][2]
        return ["record", node[1].__name__, _all_encoded(node[2], site)]
    if kind == "object" and _classes().get(_name_of(node[1])) is node[1]:
        return ["object", _name_of(node[1]), list(node[2]), _all_encoded(node[3], site)]
    raise UnknownPartError(_name_of(type(node[1].value) if kind == "held" else node[1]), site)


def _all_encoded(nodes: Any, site: str | None) -> list[Any]:
    return [_encoded(node, site) for node in nodes]


def _encoded_plain(value: Any, site: str | None) -> Any:
    if isinstance(value, torch.Size):
        return ["size", list(value)]
    if isinstance(value, torch.dtype):
        return ["dtype", str(value).removeprefix("torch.")]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    if type(value) is float:
        return ["float", value.hex()]
    if value is None or type(value) in (bool, int, str):
        return ["plain", value]
    raise UnknownPartError(type(value).__name__, site)


def _decoded(value: Any, used: set[int]) -> tuple[Any, ...]:
    kind, *parts = value
    nodes = parts[-1]
    if kind == "tensor":
        number, names, nodes = parts
        _require(type(number) is int and number >= 0)
        used.add(number)
        return ("tensor", number, _names(names), _all_decoded(nodes, used, len(names)))
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple, _all_decoded(nodes, used))
    if kind == "dict":
        keys = [_decoded(key, used)[2] for key in parts[0] if _require(key[0] in _PLAIN)]
        _require(len(set(keys)) == len(keys))
        return (dict, tuple(keys), _all_decoded(nodes, used, len(keys)))
    if kind == "record":
        record = _RECORDS[parts[0]]
        return ("named", record, _all_decoded(nodes, used, len(record._fields)))
    if kind == "object":
        name, names, nodes = parts
        return ("object", _classes()[name], _names(names), _all_decoded(nodes, used, len(names)))
    (content,) = parts
    found = _PLAIN[kind](content)
    return ("plain", type(found), found)


def _all_decoded(nodes: Any, used: set[int], count: int | None = None) -> tuple[Any, ...]:
    _require(type(nodes) is list and (count is None or len(nodes) == count))
    return tuple([_decoded(node, used) for node in nodes])


def _names(names: Any) -> tuple[str, ...]:
    _require(type(names) is list and all(type(name) is str and name.isidentifier() for name in names))
    _require(len(set(names)) == len(names) and not any(name.startswith("__") for name in names))
    return tuple(names)


def _size(sizes: Any) -> torch.Size:
    _require(type(sizes) is list and all(type(size) is int and size >= 0 for size in sizes))
    return torch.Size(sizes)


def _number(text: Any) -> float:
    return float.fromhex(text)


def _plain(value: Any) -> Any:
    _require(value is None or type(value) in (bool, int, str))
    return value


def _device(text: Any) -> torch.device:
    _require(type(text) is str)
    return torch.device(text)


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "size": _size,
    "dtype": lambda name: _DTYPES[name],
    "device": _device,
    "float": _number,
    "plain": _plain,
}


def _require(holds: bool) -> bool:
    if not holds:
        raise ValueError("no structure of a value")
    return True


def _name_of(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@cache
def _classes() -> dict[str, type]:
    """The classes of which objects may be made, by name."""
    import pyro_kd.teachers  # noqa: F401  (whose distributions are on the list)

    bases: tuple[Any, ...] = (Distribution, PyroDistribution, Transform, Constraint)
    found: list[type] = [kind for base in bases for kind in _subclasses(base) if f"{kind.__module__}.".startswith(_MODULES)]
    return {_name_of(kind): kind for kind in [*found, Subsample, AffineNormal, Gaussian, GammaGaussian]}


def _subclasses(base: Any) -> Iterator[type]:
    for kind in base.__subclasses__():
        if not issubclass(kind, nn.Module):
            yield kind
            yield from _subclasses(kind)
