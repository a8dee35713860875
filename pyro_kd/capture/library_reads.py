"""Reads of tensor values inside Pyro and torch. They do not name a guard, so this file gives them one.

A function mode sees a call such as ``Tensor.__bool__``, but not who makes it. In a user's program such a read ends the
capture, since the path of the program may depend on it. In the libraries below the answer is nearly always the same. So this file
looks at the frame that reads. It is the only file that does so, and no function of Pyro or torch is replaced. The cases:

========================================  ==============================================================================
``torch.nn.functional.one_hot``           reads the values for its checks; replaced by a comparison with all classes. In a user's
                                          program a guard has the check
an index that is a scalar tensor          is read as a number: ``x[i]`` in autoregressive transforms
``pyro.util``, ``pyro.infer.util``        an ELBO's number for its report, and warnings of NaN: the graph needs neither
all other reads in ``pyro`` or ``torch``  are guards with the name of their line: checks of parameters and supports, special
                                          cases (is a scale 0, is a stable distribution's stability near 1), rounds of a
                                          rejection sampler, row numbers of a sequential plate
========================================  ==============================================================================
"""

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_kd.utils.guards import Watcher

__all__ = ["LibraryReads"]

_LIBRARIES = ("pyro.", "torch.")
"""Prefixes of the modules whose reads are guards."""

_READS = {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item, torch.equal}
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
_REPORTING = ("pyro.util", "pyro.infer.util")
_REPORTS: Mapping[Any, Any] = {
    Tensor.item: Tensor.detach,  # the number is only reported, and may be a tensor without gradients
    Tensor.__bool__: lambda value: False,  # asks whether there is a NaN, which is checked in the loss
    Tensor.register_hook: lambda value: None,  # a hook that warns of NaN in gradients
}
_PYTHON_METHODS = ("torch.overrides", "torch._tensor")  # modules of Tensor's methods that call themselves below the mode


class LibraryReads(TorchFunctionMode):
    """While active, passes the reads that Pyro and torch make to a watcher. All other functions run unchanged."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self._watcher = watcher

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.one_hot:
            return self._one_hot(sys._getframe(1), *args, **(kwargs or {}))
        if func in _READS or func in _REPORTS or func in _INDEXING:
            frame = _reading_frame(sys._getframe(1))
            reader = str(frame.f_globals.get("__name__"))
            if reader.startswith(_LIBRARIES):
                name = f"{reader}:{frame.f_lineno}"
                if func in _INDEXING:
                    return func(args[0], self._numbers(args[1], name), *args[2:])
                if reader in _REPORTING and func in _REPORTS:
                    return _REPORTS[func](args[0])
                if func in _READS:
                    return self._watcher.answer(name, func, *args)
        return func(*args, **(kwargs or {}))

    def _one_hot(self, frame: FrameType, input: Tensor, num_classes: int = -1) -> Tensor:
        if num_classes <= 0 or input.dtype != torch.int64:
            return torch.nn.functional.one_hot(input, num_classes)
        reader = str(frame.f_globals.get("__name__"))
        if not reader.startswith((*_LIBRARIES, "pyro_kd.")):
            are_classes = ((input >= 0) & (input < num_classes)).all()
            if not self._watcher.answer(f"{reader}:{frame.f_lineno}", Tensor.__bool__, are_classes):
                return torch.nn.functional.one_hot(input, num_classes)  # which raises an error
        return (input.unsqueeze(-1) == torch.arange(num_classes, device=input.device)).long()

    def _numbers(self, index: Any, name: str) -> tuple[Any, ...]:
        """Indices with numbers in place of scalar tensors."""
        parts = index if isinstance(index, tuple) else (index,)
        return tuple(self._watcher.answer(name, Tensor.item, part) if _is_scalar(part) else part for part in parts)


def _reading_frame(frame: FrameType) -> FrameType:
    """The frame that reads, at or around this one."""
    while frame.f_globals.get("__name__") in _PYTHON_METHODS and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _is_scalar(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dim() == 0 and index.dtype not in (torch.bool, torch.uint8)
