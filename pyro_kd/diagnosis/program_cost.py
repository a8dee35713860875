"""What a program costs: the memory of what it holds, and the time of a sample. Knows one program."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from pyro_kd.isolation.effects import without_effect
from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.programs import owners
from pyro_kd.isolation.reaching import Reached
from pyro_kd.sites.tracing import get_trace, params_of

__all__ = ["ProgramCost", "cost_of"]

_RUNS = 5


@dataclass(frozen=True)
class ProgramCost:
    """What a program costs.

    Attributes:
        bytes: of the tensors that it holds: parameters, buffers, and constants.
        seconds: of one row, the median of some runs without gradients.
    """

    bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{_scaled(self.bytes, ['B', 'kB', 'MB', 'GB'])}, {_scaled(self.seconds * 1e9, ['ns', 'µs', 'ms', 's'])} a row"
        )


def cost_of(program: Callable[..., Any], args: Any, kwargs: Any, rows: int) -> ProgramCost:
    """Measure a program, without an effect on it.

    Args:
        program: the program.
        args, kwargs: its arguments.
        rows: the number of rows that a run draws.
    """
    frozen = [owner for owner in owners(program) if isinstance(owner, FrozenProgram)]
    with without_effect(program), torch.no_grad():
        trace = get_trace(program, args, kwargs)
        seconds = []
        for _ in range(_RUNS):
            start = time.perf_counter()
            program(*args, **kwargs)
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    tensors = list(frozen[0].tensors()) if frozen else [*Reached(program).all_tensors(), *params_of(trace).values()]
    held = {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
    return ProgramCost(sum(held.values()), median(seconds) / rows)


def _scaled(number: float, units: list[str]) -> str:
    for unit in units[:-1]:
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} {units[-1]}"
