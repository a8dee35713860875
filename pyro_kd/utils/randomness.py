"""Random generators that a program may use: their states, whether they have moved, and a seed for all of them."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

__all__ = ["RandomState", "global_streams", "have_moved", "is_at", "keeping_random_state", "set_seed", "stream_states"]


@dataclass(frozen=True)
class RandomState:
    """States of the generators of torch (CPU, every GPU), NumPy and Python, and of torch generators by name.

    Attributes:
        tensors: states that torch gives, by name.
        python: state of :mod:`random`.
        numpy: state of NumPy's global generator.
    """

    tensors: dict[str, Tensor]
    python: list[Any]
    numpy: list[Any]

    @classmethod
    def now(cls, generators: Mapping[str, torch.Generator] | None = None) -> "RandomState":
        """The current states."""
        tensors = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            tensors |= {f"cuda {index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
        tensors |= {f"generator {name}": generator.get_state() for name, generator in (generators or {}).items()}
        version, numbers, gauss = random.getstate()
        name, keys, *rest = np.random.get_state()
        return cls(tensors, [version, list(numbers), gauss], [name, np.asarray(keys).tolist(), *rest])

    def with_generators_of(self, other: "RandomState") -> "RandomState":
        """These states, but those of generators by name, which are another's."""
        named = {name: state for name, state in other.tensors.items() if name.startswith("generator ")}
        return RandomState({**self.tensors, **named}, self.python, self.numpy)

    def restore(self, generators: Mapping[str, torch.Generator] | None = None) -> None:
        """Set every generator to the stored state."""
        torch.set_rng_state(self.tensors["cpu"])
        for name, state in self.tensors.items():
            index = int(name.removeprefix("cuda ")) if name.startswith("cuda ") else None
            if index is not None and index < torch.cuda.device_count():  # a different machine may have fewer
                torch.cuda.set_rng_state(state, index)
        for name, generator in (generators or {}).items():
            if f"generator {name}" in self.tensors:
                generator.set_state(self.tensors[f"generator {name}"])
        version, numbers, gauss = self.python
        random.setstate((version, tuple(numbers), gauss))
        name, keys, *rest = self.numpy
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


@contextmanager
def keeping_random_state(generators: Mapping[str, torch.Generator] | None = None) -> Iterator[None]:
    """Restore every generator at the end of the context, also after an error; and further ones by name."""
    before = RandomState.now(generators)
    try:
        yield
    finally:
        before.restore(generators)


def set_seed(seed: int | None, generators: Iterable[torch.Generator] = ()) -> None:
    """Seed every generator, and further ones; None leaves them where they are."""
    if seed is not None:
        pyro.set_rng_seed(seed)
        for generator in generators:
            generator.manual_seed(seed)


def global_streams() -> list[torch.Generator]:
    """Torch's global random streams, on the CPU and on every GPU in use."""
    streams = [torch.default_generator]
    if torch.cuda.is_initialized():
        streams += torch.cuda.default_generators
    return streams


def stream_states() -> list[Tensor]:
    """The state of each of :func:`global_streams`."""
    return [stream.get_state() for stream in global_streams()]


def have_moved(before: Sequence[Tensor]) -> bool:
    """Whether one of :func:`global_streams` has left the state that :func:`stream_states` gave."""
    return any(not is_at(stream, state) for stream, state in zip(global_streams(), before, strict=False))


def is_at(stream: torch.Generator, state: Tensor) -> bool:
    """Whether a stream stands at this state."""
    return stream.get_state().numpy().tobytes() == state.numpy().tobytes()  # a quarter of the time of torch.equal
