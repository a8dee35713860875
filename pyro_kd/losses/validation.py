"""Which calls of a loss Pyro and torch validate: a twentieth of a small model's step is spent on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.util import is_validation_enabled
from torch import Tensor
from torch.distributions import Distribution

from pyro_kd.utils.torch_internals import is_validating

__all__ = ["Validation", "without_validation"]

_EVERY = 50
_MAX_KINDS = 64


class Validation:
    """Counts the calls of the pair of programs that ran last, for each kind of arguments."""

    def __init__(self) -> None:
        self._pair: tuple[Any, Any] | None = None
        self._calls: dict[Any, int] = {}

    @contextmanager
    def of_call(self, student: Any, teacher: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Leave validation as it is in the first call of a kind and in every 50th after it, and turn it off in the others.

        Found in every call are a NaN, in the loss, and a trained parameter that has left its constraint, such as a negative scale
        (:mod:`pyro_kd.losses.parameters`); anything else in one of the calls that are validated. Of a loss with several particles,
        each counts as a call.
        """
        kind = _kind_of(args, kwargs)
        if self._pair != (student, teacher) or len(self._calls) > _MAX_KINDS:
            self._pair, self._calls = (student, teacher), {}
        count = self._calls.get(kind, 0)
        if not is_validation_enabled() or kind is None or count % _EVERY == 0:
            yield
        else:
            with without_validation():
                yield
        self._calls[kind] = count + 1


@contextmanager
def without_validation() -> Iterator[None]:
    """Turn Pyro's and torch's validation off meanwhile."""
    flag = is_validating()  # which Pyro's context manager would set to its own
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        Distribution.set_default_validate_args(flag)


def _kind_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Shapes of tensors and values of numbers and names, with the grad mode; None where there are other arguments."""
    kind: list[Any] = [tuple(kwargs), torch.is_grad_enabled()]
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            kind.append((value.shape, value.dtype))
        elif isinstance(value, int | str) or value is None:
            kind.append((type(value), value))
        else:
            return None
    return tuple(kind)
