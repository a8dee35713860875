"""Deferred reads: values on a GPU that are read in a later call, without waiting for them."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["DeferredReads"]


class DeferredReads:
    """Scalars on their way from a GPU to the host, each with a function that takes its value once it has arrived."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Any, Callable[[Any], None]]] = deque()

    def add(self, value: Tensor, then: Callable[[Any], None]) -> None:
        """Start the copy of a scalar to the host. ``then`` is called with its value."""
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(value.device))
        self._waiting.append((host, event, then))

    def collect(self) -> None:
        """Pass the values that have arrived to their functions, in the order in which they were added."""
        while self._waiting and self._waiting[0][1].query():
            host, _, then = self._waiting.popleft()
            then(host.item())

    def clear(self) -> None:
        """Forget all values that have not arrived yet."""
        self._waiting.clear()
