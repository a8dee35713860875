"""The tape under ``torch.export``, which writes a program down from above torch's dispatcher.

An exported program's operations are noted before they are dispatched, so that a mode below the dispatcher comes too late: the
graph would hold the random operations themselves. So there the tape catches the calls of torch's Python functions instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pyro_kd.transforms import TRANSFORMS

__all__ = ["FunctionTape"]

_PACKETS = {op.overloadpacket.__name__: op.overloadpacket for op in TRANSFORMS}
_TAKE_SIZES_ONE_BY_ONE = frozenset({"rand", "randn"})


class FunctionTape(TorchFunctionMode):
    """Hands the random functions of torch that a program calls to a tape.

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
        if packet.__name__ in _TAKE_SIZES_ONE_BY_ONE and args and isinstance(args[0], int):
            args = (args,)
        name = torch._C._jit_resolve_packet(packet._qualified_op_name, *args, **kwargs)
        return self._run(getattr(packet, name), args, kwargs)
