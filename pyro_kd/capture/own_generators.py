"""The random generators that programs have of their own. A graph has none of them, and a capture leaves them as they were."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from pyro_kd.isolation.reaching import Generator, Reached

__all__ = ["OwnGenerators"]


class OwnGenerators(TorchFunctionMode):
    """Notes their states: of those of Python and NumPy that programs reach, and of those of torch that they draw from in the context.

    Args:
        roots: the programs, and what else they are called with.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        super().__init__()
        self._states: dict[Generator | torch.Generator, Any] = {each: _state(each) for each in Reached(*roots).generators}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None and generator not in self._states:
            self._states[generator] = _state(generator)
        return func(*args, **kwargs)

    def restore(self) -> None:
        """Put all of them back."""
        for generator, state in self._states.items():
            _restore(generator, state)


def _state(generator: Generator | torch.Generator) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _restore(generator: Generator | torch.Generator, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
