"""Deferred reads: values of a GPU, read in a later call without waiting for them."""

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
        """Send a scalar on its way."""
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(value.device))
        self._waiting.append((host, event, then))

    def collect(self) -> None:
        """Hand over what has arrived, in its order."""
        while self._waiting and self._waiting[0][1].query():
            host, _, then = self._waiting.popleft()
            then(host.item())

    def clear(self) -> None:
        """Forget what is on its way."""
        self._waiting.clear()
