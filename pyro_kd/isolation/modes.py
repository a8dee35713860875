"""Running programs without an effect on their modules: modes and buffers are afterwards as they were.

A module need not be called for that: its methods and its tensors are used by flows, by functions, by other modules. So modules
count that a program reaches (:mod:`pyro_kd.isolation.reaching`), and those that are called besides.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes

from pyro_kd.utils.tensors import same_values

__all__ = ["KeptTensors", "hooked", "in_mode", "keeping_buffers", "uncompiled", "untouched"]


@contextmanager
def in_mode(training: bool, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules in train or eval mode meanwhile, each by its own flag; a TorchScript module may have none."""
    changed = [module for module in modules if getattr(module, "training", training) != training]
    for module in changed:
        module.training = training
    try:
        yield
    finally:
        for module in changed:
            module.training = not training


@contextmanager
def keeping_buffers(modules: Iterable[nn.Module]) -> Iterator["KeptTensors"]:
    """Give modules' buffers back the values that they have now, and put back those that were exchanged for others."""
    kept = KeptTensors()
    for module in modules:
        kept.add(module)
    try:
        yield kept
    finally:
        kept.restore()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run networks under ``torch.compile`` as they were written: a capture compiles them with the rest, and hooks see their parts."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and it takes seconds to import
        yield
        return
    with (
        warnings.catch_warnings(),
        torch.compiler.set_stance("force_eager"),
        torch._dynamo.config.patch(error_on_nested_fx_trace=False),
    ):
        warnings.filterwarnings(
            "ignore", ".*when there are global hooks on modules", UserWarning
        )  # ours, which may be called twice
        yield


@contextmanager
def hooked(hook: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Call a function before each module meanwhile. A compiled one runs uncompiled, or torch would compile the function as well."""
    handle = register_module_forward_pre_hook(hook)
    try:
        with uncompiled():
            yield
    finally:
        handle.remove()


@contextmanager
def untouched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run programs in eval mode and leave no trace in these modules, or in others that are called."""
    kept, known = KeptTensors(), set[nn.Module]()
    with ExitStack() as modes:

        def protect(module: nn.Module, args: Any = None) -> None:
            if module not in known:
                known.add(module)
                kept.add(module)
            modes.enter_context(in_mode(False, [module]))

        for module in modules:
            protect(module)
        try:
            with hooked(protect):
                yield
        finally:
            kept.restore()


class KeptTensors:
    """Tensors with their values at the time when they were added, and the names of buffers in their modules.

    Attributes:
        moved: whether any was written to, or replaced, when it was restored.
        replaced: the names of buffers that had a different tensor in their place.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
        self._values: dict[Tensor, tuple[Tensor, int]] = {}
        self.moved = False
        self.replaced: set[str] = set()

    def add(self, module: nn.Module) -> None:
        """Keep the buffers of a module, its parts not included."""
        for name, buffer in module._buffers.items():
            self._buffers.append((module._buffers, name, buffer))
            self.keep(buffer)

    @torch.no_grad()
    def keep(self, tensor: Tensor | None) -> None:
        """Keep the value of a tensor of any shape, unless it has none yet, or is sparse."""
        if tensor is None or tensor in self._values or is_lazy(tensor):
            return
        if tensor.layout == torch.strided and tensor.device.type != "meta":
            self._values[tensor] = tensor.detach().clone(), _version(tensor)

    @torch.no_grad()
    def restore(self) -> None:
        """Give all of them back their values, and buffers their places."""
        for holder, name, buffer in self._buffers:
            if name not in holder or holder[name] is not buffer:
                holder[name] = buffer
                self.replaced.add(name)
                self.moved = True
        for tensor, (value, version) in self._values.items():
            if _version(tensor) != version or not _is_equal(tensor, value):  # writes to tensor.data count no version
                tensor.copy_(value)
                self._values[tensor] = value, _version(tensor)
                self.moved = True


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _is_equal(one: Tensor, two: Tensor) -> bool:
    with _disable_current_modes(), torch._C.DisableTorchFunction():  # whoever records operations need not see this question
        return same_values(one, two)
