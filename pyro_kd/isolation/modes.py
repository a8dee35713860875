"""Run programs without an effect on their modules: modes and buffers are restored afterwards.

A program uses modules without calling them: flows, functions and other modules use their methods and tensors. So all modules
are protected that a program reaches (:mod:`pyro_kd.isolation.reaching`) and that it calls.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_kd.isolation.reaching import Reached
from pyro_kd.utils.tensors import same_values
from pyro_kd.utils.torch_internals import DisableTorchFunction, disable_current_modes, dynamo_config, version_of

__all__ = ["evaluation_mode", "hooked", "in_mode", "keeping_buffers", "uncompiled", "untouched"]


@contextmanager
def in_mode(training: bool, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules in train or eval mode inside the context, each by its own flag, which a TorchScript module may lack."""
    changed = [module for module in modules if getattr(module, "training", training) != training]
    for module in changed:
        module.training = training
    try:
        yield
    finally:
        for module in changed:
            module.training = not training


@contextmanager
def keeping_buffers(modules: Iterable[nn.Module]) -> Iterator["KeptBuffers"]:
    """Restore the buffers of modules at the end: their current values, and the current tensors if a run replaces them."""
    kept = KeptBuffers()
    for module in modules:
        kept.add(module)
    try:
        yield kept
    finally:
        kept.restore()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run networks under ``torch.compile`` uncompiled: a capture compiles them itself, and hooks see their parts."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        yield
        return
    with (
        warnings.catch_warnings(),
        torch.compiler.set_stance("force_eager"),
        dynamo_config().patch(error_on_nested_fx_trace=False),
    ):
        warnings.filterwarnings(
            "ignore", ".*when there are global hooks on modules", UserWarning
        )  # ours, which may be called twice
        yield


@contextmanager
def hooked(hook: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Call a function before each call of a module. Compiled modules run uncompiled, or torch would compile the function too."""
    handle = register_module_forward_pre_hook(hook)
    try:
        with uncompiled():
            yield
    finally:
        handle.remove()


@contextmanager
def untouched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run programs in eval mode, and leave these modules and all that are called as they were."""
    kept, known = KeptBuffers(), set[nn.Module]()
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


class KeptBuffers:
    """Buffers with the values that they had when their modules were added.

    Attributes:
        moved: whether any buffer had a different value when it was restored.
    """

    def __init__(self) -> None:
        self._held: list[tuple[nn.Module, str, Tensor | None]] = []
        self._values: dict[Tensor, tuple[Tensor, int]] = {}
        self.moved = False

    @torch.no_grad()
    def add(self, module: nn.Module) -> None:
        """Keep the buffers of a module, without those of its parts."""
        for name, buffer in module._buffers.items():
            self._held.append((module, name, buffer))
            if buffer is not None and buffer not in self._values:
                self._values[buffer] = buffer.clone(), version_of(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore all buffers."""
        for module, name, buffer in self._held:
            if name not in module._buffers or module._buffers[name] is not buffer:
                module._buffers[name] = buffer
                self.moved = True
        for buffer, (value, version) in self._values.items():
            if version_of(buffer) != version or not _is_equal(
                buffer, value
            ):  # writes to buffer.data do not change the version
                buffer.copy_(value)
                self.moved = True


def _is_equal(one: Tensor, two: Tensor) -> bool:
    with disable_current_modes(), DisableTorchFunction():  # hidden from whatever records operations
        return same_values(one, two)


@contextmanager
def evaluation_mode(*programs: Any) -> Iterator[None]:
    """Run programs without changing them: without gradients, with modules in eval mode, and with buffers restored at the end.

    Gradients stay on for programs that differentiate inside.

    Args:
        *programs: the programs that will run. All modules that they reach or call are protected.
    """
    reached = Reached(*programs)
    with untouched(reached.modules), torch.enable_grad() if reached.differentiates else torch.no_grad():
        yield
