"""Objects that are what their attributes are: distributions, transforms and their parts. What else a program may hold is opaque."""

from typing import Any

from pyro.distributions.distribution import Distribution as PyroDistribution
from torch import nn
from torch.distributions import Distribution, ExpTransform, Transform

__all__ = ["is_transparent", "parts_of"]

_INVERSE = type(ExpTransform().inv)

_LIBRARIES = ("torch.distributions", "pyro.distributions", "pyro.ops")


def is_transparent(value: Any) -> bool:
    """Whether an object is a distribution, a transform, or a part of one, and is what its attributes are."""
    if isinstance(value, nn.Module | type) or not hasattr(value, "__dict__"):
        return False
    if isinstance(value, Distribution | Transform | PyroDistribution):
        return True
    return type(value).__module__.startswith(_LIBRARIES) and not callable(value)


def parts_of(value: Any) -> dict[str, Any]:
    """The attributes of such an object by name, without a transform's reference to its inverse, which refers back to it."""
    return {name: None if _is_back(name, value) else part for name, part in vars(value).items()}


def _is_back(name: str, value: Any) -> bool:
    """Whether an attribute is a transform's reference to its inverse, which it makes anew, and which refers to it."""
    return name == "_inv" and isinstance(value, Transform) and not isinstance(value, _INVERSE)
