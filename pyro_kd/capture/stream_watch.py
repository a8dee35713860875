"""Watches torch's random streams during a recorded run: a graph draws from them, and does nothing else to them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_kd.capture.refusal import RefusedError

__all__ = ["StreamWatch"]


class StreamWatch:
    """Notes where each stream stands after each draw. If it has moved before the next draw, the program has moved it.

    Args:
        devices: of the tensors that go into the run.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._states = {device: _state(device) for device in {torch.device("cpu"), *devices}}

    @contextmanager
    def draw(self, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Stands around a random operation.

        Args:
            tensors: the tensors among its arguments, of any shapes.
            args, kwargs: all of its arguments.

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
        devices = {*self._states, *(tensor.device for tensor in tensors)}
        self._states = {device: _state(device) for device in devices}

    def check(self) -> None:
        """Raise RefusedError where a stream has moved since the last draw."""
        for device, state in self._states.items():
            if not torch.equal(_state(device), state):
                raise RefusedError(
                    "the program sets torch's random stream (torch.manual_seed, torch.random.fork_rng, or torch.utils.checkpoint "
                    "around dropout), which a graph does not. Make what is fixed once, before the program; leave out dropout where "
                    "activations are recomputed."
                )


def _state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()
