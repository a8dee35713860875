"""A mode that makes the draws of torch's random operations, also under ``torch.export``.

``torch.export`` records operations before they are dispatched. A mode below the dispatcher comes too late for it: the graph
would hold the random operations themselves. So under an export, the mode catches calls of torch's Python functions instead.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from pyro_kd.noise.torch_ops import TRANSFORMS
from pyro_kd.utils.torch_internals import TorchDispatchMode, overload_for, qualified_name

__all__ = ["DrawMode"]

_Mode = TypeVar("_Mode", bound="DrawMode")
_PACKETS = {op.overloadpacket.__name__: op.overloadpacket for op in TRANSFORMS}
_TAKE_SIZES_ONE_BY_ONE = frozenset({"rand", "randn"})


class DrawMode(TorchDispatchMode):
    """Hands torch's random operations to :meth:`run`, from below the dispatcher or, under ``torch.export``, from above it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._above: _FunctionMode | None = None

    @abstractmethod
    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the draw of a random operation.

        Args:
            func: the overload of the operation.
            args, kwargs: its arguments.
        """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in TRANSFORMS or torch.Tag.nondeterministic_seeded in func.tags:
            return self.run(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def __enter__(self: _Mode) -> _Mode:
        if torch.compiler.is_exporting():
            self._above = _FunctionMode(self.run)
            self._above.__enter__()  # type: ignore[no-untyped-call]
        else:
            super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._above is None:
            super().__exit__(*exception)  # type: ignore[no-untyped-call]
        else:
            self._above.__exit__(*exception)  # type: ignore[no-untyped-call]
            self._above = None


class _FunctionMode(TorchFunctionMode):
    """Catches calls of torch's random functions.

    Args:
        run: ``run(overload, args, kwargs)`` makes the draw.
    """

    def __init__(self, run: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = _PACKETS.get(getattr(func, "__name__", ""))
        if packet is None:
            return func(*args, **kwargs)
        if packet.__name__ in _TAKE_SIZES_ONE_BY_ONE and args and isinstance(args[0], int | torch.SymInt):
            args = (args,)
        name = overload_for(qualified_name(packet), *args, **kwargs)
        return self._run(getattr(packet, name), args, kwargs)
