"""Which calls of a loss are validated by Pyro and torch: validation takes about 5 % of a small model's step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.util import is_validation_enabled
from torch import Tensor
from torch.distributions import Distribution

from pyro_kd.utils.torch_internals import is_validating

__all__ = ["ValidationSchedule", "without_validation"]

_EVERY = 50
_MOST_SIGNATURES = 64


class ValidationSchedule:
    """Counts the calls of a pair of programs per signature of their arguments, and validates only some of them."""

    def __init__(self) -> None:
        self._calls: dict[Any, int] = {}

    @contextmanager
    def of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Leave validation as it is in the first call per signature and in every 50th call after that; turn it off in between.

        Two errors are found in every call: a NaN in the loss, and a trained parameter that violates its constraint, such as a
        negative scale (:mod:`pyro_kd.losses.constraints`). All others are found in validated calls. Each particle counts as a call.
        """
        signature = _signature(args, kwargs)
        if len(self._calls) > _MOST_SIGNATURES:
            self._calls.clear()
        count = self._calls.get(signature, 0)
        if not is_validation_enabled() or signature is None or count % _EVERY == 0:
            yield
        else:
            with without_validation():
                yield
        self._calls[signature] = count + 1


@contextmanager
def without_validation() -> Iterator[None]:
    """Turn Pyro's and torch's validation off inside the context."""
    flag = is_validating()  # Pyro's context manager would set torch's flag to Pyro's at the end
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        Distribution.set_default_validate_args(flag)


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Shapes of tensors and values of numbers and names, with the grad mode; None where there are arguments of different types."""
    parts: list[Any] = [tuple(kwargs), torch.is_grad_enabled()]
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            parts.append((value.shape, value.dtype))
        elif isinstance(value, int | str) or value is None:
            parts.append((type(value), value))
        else:
            return None
    return tuple(parts)
