"""Tells the user what a capture is doing, again and again while it takes long.

stage("compiling 1,800 operations") --> the logger pyro_kd.capture, and whoever listens, such as a progress bar
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["listening", "stage"]

logger = logging.getLogger("pyro_kd.capture.stages")

_listeners: list[Callable[[str], None]] = []


@contextmanager
def listening(hear: Callable[[str], None]) -> Iterator[None]:
    """Call ``hear(text)`` at the begin of each stage of a capture, then every few seconds until it ends, and with "" at its end.

    While a stage goes on, the calls come from a thread of their own.
    """
    _listeners.append(hear)
    try:
        yield
    finally:
        _listeners.remove(hear)


@contextmanager
def stage(what: str, *, every: float = 5.0) -> Iterator[None]:
    """Say what is being done in the block.

    Args:
        what: such as "compiling 1,800 operations".
        every: seconds between two messages.
    """
    begin, is_done = time.monotonic(), threading.Event()

    def say(text: str) -> None:
        for hear in list(_listeners):
            hear(text)

    def go_on() -> None:
        while not is_done.wait(every):
            text = f"{what}: {time.monotonic() - begin:.0f} s"
            logger.info("%s", text)
            say(text)

    logger.info("%s", what)
    say(what)
    thread = threading.Thread(target=go_on, name="pyro_kd.capture", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()
        say("")
