"""Torch's global random streams: where they stand, and whether a program draws from them outside of its sample sites.

A look at the streams costs almost nothing, whereas a :class:`~pyro_kd.noise.between.ProgramTape` costs some microseconds for
each torch operation. So the losses watch the streams first. Knows generators and their states, no sites and no draws.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pyro_kd.utils.randomness import global_streams, is_at

__all__ = ["OTHER_STREAMS", "StreamWatch", "states_of_others"]

OTHER_STREAMS = ("Python's random", "numpy.random")
"""The global random streams outside of torch, in the order of :func:`states_of_others`."""


def states_of_others() -> tuple[Any, ...]:
    """The states of the global random streams of Python and NumPy."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (name, np.asarray(keys).tobytes(), *rest)


class StreamWatch:
    """Notices whether a program draws from torch's global random streams outside of its sample sites.

    Within the context, sites draw from generators that continue the global streams (:meth:`generator`), so the global streams
    move only if something else draws from them. At the end they are set to where the sites' generators stand, so that the watch
    changes no draw. If :attr:`moved`, they are set back to their start instead, so that the program can be run again.

    Attributes:
        moved: whether something was drawn outside of the sites. Draws from a generator that the program holds are not noticed.
    """

    def __init__(self) -> None:
        self.moved = False
        self._streams = global_streams()
        self._before = [stream.get_state() for stream in self._streams]
        self._own = [
            torch.Generator(stream.device).set_state(state)
            for stream, state in zip(self._streams, self._before, strict=True)
        ]

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The generator for the noise of sites on this device."""
        return next((own for own in self._own if own.device == device or own.device.type == device.type == "cpu"), None)

    @contextmanager
    def at_site(self) -> Iterator[None]:
        """Let a site's own sampler draw from the global streams without being noticed."""
        parked = [stream.get_state() for stream in self._streams]
        for stream, own in zip(self._streams, self._own, strict=True):
            stream.set_state(own.get_state())
        try:
            yield
        finally:
            for stream, own, state in zip(self._streams, self._own, parked, strict=True):
                own.set_state(stream.get_state())
                stream.set_state(state)

    def __enter__(self) -> "StreamWatch":
        return self

    def __exit__(self, exception: Any, *details: Any) -> None:
        self.moved = any(not is_at(stream, before) for stream, before in zip(self._streams, self._before, strict=True))
        keep = self._before if self.moved else [own.get_state() for own in self._own]
        for stream, state in zip(self._streams, keep, strict=True):
            stream.set_state(state)
