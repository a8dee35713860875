"""A clock of wall time and processor time that can be stopped."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Clock"]


class Clock:
    """Runs from the start, except while it is paused.

    Processor time is that of all threads of this process and of the child processes that have ended, such as a C++ compiler. A CUDA device first ends the work that it was given.
    """

    def __init__(self) -> None:
        self._begin = _now()
        self._paused = (0.0, 0.0)

    def seconds(self) -> tuple[float, float]:
        """Wall time and processor time."""
        now = _now()
        return (
            now[0] - self._begin[0] - self._paused[0],
            now[1] - self._begin[1] - self._paused[1],
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop while the context lasts."""
        before = _now()
        try:
            yield
        finally:
            after = _now()
            self._paused = (
                self._paused[0] + after[0] - before[0],
                self._paused[1] + after[1] - before[1],
            )


def _now() -> tuple[float, float]:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    of_children = os.times()
    return time.perf_counter(), time.process_time() + of_children.children_user + of_children.children_system
