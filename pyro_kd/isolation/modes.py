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

from pyro_kd.isolation.reaching import Reached
from pyro_kd.utils.tensors import same_values
from pyro_kd.utils.torch_internals import DisableTorchFunction, disable_current_modes, dynamo_config, version_of

__all__ = ["evaluation_mode", "hooked", "in_mode", "keeping_buffers", "uncompiled", "untouched"]


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
def keeping_buffers(modules: Iterable[nn.Module]) -> Iterator["KeptBuffers"]:
    """Give modules' buffers back the values that they have now, and put back those that were exchanged for others."""
    kept = KeptBuffers()
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
        dynamo_config().patch(error_on_nested_fx_trace=False),
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
    """Buffers with their values at the time when their modules were added.

    Attributes:
        moved: whether any had another value when it was restored.
    """

    def __init__(self) -> None:
        self._held: list[tuple[nn.Module, str, Tensor | None]] = []
        self._values: dict[Tensor, tuple[Tensor, int]] = {}
        self.moved = False

    @torch.no_grad()
    def add(self, module: nn.Module) -> None:
        """Keep the buffers of a module, its parts not included."""
        for name, buffer in module._buffers.items():
            self._held.append((module, name, buffer))
            if buffer is not None and buffer not in self._values:
                self._values[buffer] = buffer.clone(), version_of(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        """Give all of them back their values."""
        for module, name, buffer in self._held:
            if name not in module._buffers or module._buffers[name] is not buffer:
                module._buffers[name] = buffer
                self.moved = True
        for buffer, (value, version) in self._values.items():
            if version_of(buffer) != version or not _is_equal(buffer, value):  # writes to buffer.data count no version
                buffer.copy_(value)
                self.moved = True


def _is_equal(one: Tensor, two: Tensor) -> bool:
    with disable_current_modes(), DisableTorchFunction():  # whoever records operations need not see this question
        return same_values(one, two)


@contextmanager
def evaluation_mode(*programs: Any) -> Iterator[None]:
    """Run programs without changing them: no gradients, modules in eval mode, and buffers as they were.

    Args:
        *programs: the programs that will run. Whatever module they reach is protected, and every other one that is called.
    """
    reached = Reached(*programs)
    with untouched(reached.modules), torch.enable_grad() if reached.differentiates else torch.no_grad():
        yield
