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
from torch.nn.parameter import is_lazy

from pyro_kd.isolation.reaching import Reached
from pyro_kd.utils.tensors import same_values
from pyro_kd.utils.torch_internals import DisableTorchFunction, disable_current_modes, dynamo_config, version_of

__all__ = [
    "KeptTensors",
    "evaluation_mode",
    "hooked",
    "in_mode",
    "keeping_buffers",
    "on_copied_buffers",
    "uncompiled",
    "untouched",
]


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
def keeping_buffers(modules: Iterable[nn.Module]) -> Iterator["KeptTensors"]:
    """Restore the buffers of modules at the end: their current values, and the current tensors if a run replaces them."""
    kept = KeptTensors()
    for module in modules:
        kept.add(module)
    try:
        yield kept
    finally:
        kept.restore()


@contextmanager
def on_copied_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules write to copies of their buffers inside the context. A gradient that needs the buffers can then still be taken."""
    places = [(module._buffers, name, buffer) for module in modules for name, buffer in module._buffers.items()]
    copies = {id(buffer): buffer.clone() for _, _, buffer in places if buffer is not None and not is_lazy(buffer)}
    for holder, name, buffer in places:
        holder[name] = copies.get(id(buffer), buffer)
    try:
        yield
    finally:
        for holder, name, buffer in places:
            holder[name] = buffer


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
    """Tensors with the values that they had when they were added, and the buffers of modules with their places.

    Attributes:
        moved: whether any tensor had a different value, or was replaced, when it was restored.
        replaced: the names of buffers that had a different tensor in their place.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
        self._values: dict[Tensor, tuple[Tensor, int]] = {}
        self.moved = False
        self.replaced: set[str] = set()

    def add(self, module: nn.Module) -> None:
        """Keep the buffers of a module, without those of its submodules."""
        for name, buffer in module._buffers.items():
            self._buffers.append((module._buffers, name, buffer))
            self.keep(buffer)

    @torch.no_grad()
    def keep(self, tensor: Tensor | None) -> None:
        """Keep the value of a tensor of any shape, unless it has none yet or is sparse."""
        if tensor is None or tensor in self._values or is_lazy(tensor):
            return
        if tensor.layout == torch.strided and tensor.device.type != "meta":
            self._values[tensor] = tensor.detach().clone(), version_of(tensor)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore all tensors, and put buffers back in their places."""
        for holder, name, buffer in self._buffers:
            if name not in holder or holder[name] is not buffer:
                holder[name] = buffer
                self.replaced.add(name)
                self.moved = True
        for tensor, (value, version) in self._values.items():
            if version_of(tensor) != version or not _is_equal(
                tensor, value
            ):  # writes to tensor.data do not change the version
                tensor.copy_(value)
                self._values[tensor] = value, version_of(tensor)
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
