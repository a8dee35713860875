"""Mixed precision: which autocast modes are on, and where. Knows torch's modes, and no programs.

A loss runs its programs under autocast, and computes everything else, from draws to the sum of its terms, without it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch

__all__ = ["AutocastModes", "autocast_modes", "full_precision", "modes_of_programs", "without_autocast"]

AutocastModes = tuple[tuple[str, torch.dtype], ...]
"""Types of devices, each with the type that autocast computes in."""

_OF_PROGRAMS: ContextVar[AutocastModes] = ContextVar("autocast modes of programs", default=())


def autocast_modes() -> AutocastModes:
    """The device types for which autocast is on, with its dtypes."""
    return tuple(
        [(device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    )


@contextmanager
def without_autocast(modes: AutocastModes) -> Iterator[None]:
    """Turn autocast off inside the context."""
    with ExitStack() as stack:
        for device, _ in modes:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Turn autocast off inside the context, but for the programs that are run there (:func:`modes_of_programs`)."""
    modes = autocast_modes()
    if not modes:
        yield
        return
    token = _OF_PROGRAMS.set(modes)
    try:
        with without_autocast(modes):
            yield
    finally:
        _OF_PROGRAMS.reset(token)


def modes_of_programs() -> AutocastModes:
    """The modes that programs run under: those that are on, or that :func:`full_precision` has turned off."""
    return autocast_modes() or _OF_PROGRAMS.get()
