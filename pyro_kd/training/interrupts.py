"""Ctrl-C as an event that the loop checks between steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["interruptible", "noting"]


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, which is checked between steps; the second raises KeyboardInterrupt as usual.

    Where Ctrl-C is ignored, as in a background process, it stays ignored.
    """
    event = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield event
        return

    def note(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def noting(interrupt: threading.Event) -> Iterator[None]:
    """Treat a KeyboardInterrupt that a user's code raises between steps as Ctrl-C; after a Ctrl-C, as the second."""
    try:
        yield
    except KeyboardInterrupt:
        if interrupt.is_set():
            raise
        interrupt.set()
