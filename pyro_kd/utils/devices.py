"""Devices: whether one exists, and a value with its tensors on a different one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_kd.errors import MissingDeviceError
from pyro_kd.utils.transparent import is_transparent, parts_of

__all__ = ["moved", "require_device"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype)


def require_device(device: Any, option: str = "device") -> torch.device:
    """The device with its number, such as ``cuda:0`` for ``cuda``.

    Args:
        device: the device, as a user names it.
        option: the option that names it.

    Raises:
        MissingDeviceError: no tensor can be made on it.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # torch has no specific error for it
        there = ["'cpu'", *(f"'cuda:{index}'" for index in range(torch.cuda.device_count()))]
        there += ["'mps'"] if torch.backends.mps.is_available() else []
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingDeviceError(f"{option}={device!r} is not there ({reason}). There is {', '.join(there)}.") from error


def moved(value: Any, source: torch.device, target: torch.device, opaque: Callable[[Any], None] = lambda value: None) -> Any:
    """A value whose tensors on one device are on another. Tensors on a third device stay there.

    Args:
        value: tensors of any shapes, in tuples, lists, dictionaries, distributions, and transforms. Autograd follows the move.
        source, target: the devices.
        opaque: is called with each object that is none of these, which stays as it is.
    """
    return _Move(source, target, opaque)(value) if source != target else value


class _Move:
    def __init__(self, source: torch.device, target: torch.device, opaque: Callable[[Any], None]) -> None:
        self._source, self._target, self._opaque = source, target, opaque
        self._done: dict[int, tuple[Any, Any]] = {}  # with the original, so that no id is used twice

    def __call__(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, torch.device):
            return self._target if value == self._source else value
        found = self._done.get(id(value))
        if found is None:
            found = self._done[id(value)] = value, self._made(value)
        return found[1]

    def _made(self, value: Any) -> Any:
        kind: Any = type(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if kind is list or kind is tuple:
            return kind([self(item) for item in value])
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return kind(*map(self, value))
        if kind is dict:
            return {key: self(item) for key, item in value.items()}
        if is_transparent(value):
            made = kind.__new__(kind)
            vars(made).update({name: self._part(name, part) for name, part in parts_of(value).items()})
            return made
        self._opaque(value)
        return value

    def _part(self, name: str, part: Any) -> Any:
        """An attribute of a distribution or transform. A plate keeps the device of its rows as a user has named it."""
        return self(torch.device(part) if name == "device" and isinstance(part, str) else part)

    def _tensor(self, value: Tensor) -> Tensor:
        if value.device != self._source:
            return value
        there = value.to(self._target)
        if not isinstance(value, nn.Parameter):
            for name, part in vars(value).items():  # a draw carries what it was before it was rounded
                if isinstance(part, Tensor):
                    setattr(there, name, self(part))
        return there
