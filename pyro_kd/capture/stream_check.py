"""Checks torch's random streams during a recorded run: a graph draws from them, and does nothing else to them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pyro_kd.capture.refusal import RefusedError
from pyro_kd.utils.randomness import have_moved, stream_states

__all__ = ["StreamCheck"]


class StreamCheck:
    """Notes where the streams stand after each draw. If one has moved before the next draw, the program has moved it."""

    def __init__(self) -> None:
        self._states = stream_states()

    @contextmanager
    def draw(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Stands around a random operation.

        Args:
            args, kwargs: its arguments.

        Raises:
            RefusedError: a stream was moved before it, or the operation has a stream of its own.
        """
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            raise RefusedError(
                "the program draws from a torch.Generator of its own, which a graph does not have. Draw from torch's stream, or "
                "pass the draws as arguments."
            )
        self.check()
        yield
        self._states = stream_states()

    def check(self) -> None:
        """Raise RefusedError where a stream has moved since the last draw."""
        if have_moved(self._states):
            raise RefusedError(
                "the program sets torch's random stream (torch.manual_seed, torch.random.fork_rng, or torch.utils.checkpoint "
                "around dropout), which a graph does not. Make what is fixed once, before the program; leave out dropout where "
                "activations are recomputed."
            )
