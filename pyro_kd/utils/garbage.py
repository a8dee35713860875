"""Python's garbage collector, and what it costs while hundreds of thousands of objects are made."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["no_collections"]


@contextmanager
def no_collections() -> Iterator[None]:
    """Turn the garbage collector off inside the context: it would go through all objects repeatedly while more are made."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
