"""A second device on a machine that has one: tensors that say that they are there, and must not meet those of the CPU."""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary

SECOND = torch.device("lazy:0")
"""A device of which torch knows the name, and which no test uses otherwise."""

_CPU = torch.device("cpu")
_DEVICE = Tensor.device.__get__
_DATA = Tensor.data.__set__


class MeetingError(RuntimeError):
    """An operation was given tensors on two devices."""


class _TwoDevices(TorchFunctionMode):
    """Notes which tensors are on the second device; in truth all are on the CPU. As on a GPU, tensors of rank 0 on the CPU may meet others.

    Attributes:
        num_operations: how many operations had a result on the second device.
        num_moves: how many tensors were moved from one device to the other.
    """

    def __init__(self):
        super().__init__()
        self._there = WeakIdKeyDictionary()
        self.num_operations = 0
        self.num_moves = 0

    def device_of(self, tensor):
        return SECOND if tensor in self._there else _CPU

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == _DEVICE:
            return self.device_of(args[0])
        if func == _DATA:
            self._place(args[0], self.device_of(args[1]))
            return func(*args)
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._to(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "requires_grad_", "backward", "__repr__", "_has_compatible_shallow_copy_type"):
            result = func(*args, **kwargs)  # a part of a tensor, such as its gradient, is where that is
            return self._placed(result, self.device_of(args[0])) if name == "__get__" else result
        if name == "copy_":  # between devices, too
            return self._placed(func(*args, **kwargs), self.device_of(args[0]))
        found = {self.device_of(item) for item in tree_iter((args, kwargs)) if isinstance(item, Tensor) and item.dim()}
        if len(found) > 1:
            raise MeetingError(f"{name} was given tensors on the CPU and on {SECOND}")
        scalars = {self.device_of(item) for item in tree_iter((args, kwargs)) if isinstance(item, Tensor)}
        device = found.pop() if found else SECOND if SECOND in scalars else _CPU
        if "device" in kwargs:
            named = kwargs.pop("device")
            if named is not None:
                device = _as_device(named)
        return self._placed(func(*args, **kwargs), device)

    def _to(self, func, args, kwargs):
        tensor, *rest = args
        copies = kwargs.pop("copy", False)
        if func is not Tensor.to:
            rest, kwargs = [_CPU], {}
        other = next((item for item in (*rest, *kwargs.values()) if isinstance(item, Tensor)), None)
        if other is not None:
            named, dtype = self.device_of(other), other.dtype
        else:
            rest = [_as_device(item) if isinstance(item, str) else item for item in rest]
            named, dtype, _, _ = torch._C._nn._parse_to(*rest, **kwargs)
        kept = tensor.to(dtype or tensor.dtype, copy=copies)
        source = self.device_of(tensor)
        device = source if named is None else _as_device(named)
        if device == source:
            return self._placed(kept, device)
        self.num_moves += 1
        return self._placed(kept.clone(), device)

    def _placed(self, result, device):
        def place(item):
            if isinstance(item, Tensor):
                self._place(item, device)
            return item

        if isinstance(result, Tensor | tuple | list):
            tree_map(place, result)
            self.num_operations += device == SECOND
        return result

    def _place(self, tensor, device):
        if device == SECOND:
            self._there[tensor] = True
        else:
            self._there.pop(tensor, None)


def _as_device(device):
    device = torch.device(device)
    if device.type not in ("cpu", SECOND.type):
        raise RuntimeError(f"there is no {device}")
    return _CPU if device.type == "cpu" else SECOND


@contextmanager
def two_devices():
    """Inside the context there are two devices, ``"cpu"`` and ``SECOND``."""
    with _TwoDevices() as mode:
        yield mode


__all__ = ["SECOND", "MeetingError", "two_devices"]
