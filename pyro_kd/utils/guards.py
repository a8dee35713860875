"""Reads of tensor values that a capture can verify. Wherever this package branches on a value, it reads the value here, with a name.

A captured run is a graph of tensors, in which no Python code can ask ``if mask.all():``. So each such question gets a name. Outside
of a capture these functions are plain reads. While a run is observed, the watcher notes the answers under their names. While the
run is traced, it returns the noted answers, and the graph verifies them in each call (:mod:`pyro_kd.capture.guards`).

Knows tensors, but neither programs nor graphs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Watcher", "equal", "holds", "is_active", "number", "watched_by"]


class Watcher(Protocol):
    """An object that is asked for the answer of every read while a run is observed or traced."""

    def answer(self, name: str, read: Callable[..., Any], *tensors: Tensor) -> Any:
        """The answer of ``read(*tensors)``, or the one that was noted for this read.

        Args:
            name: the name of the guard.
            read: the reading function, such as ``Tensor.item``, ``Tensor.__bool__`` or ``torch.equal``.
            *tensors: a scalar, or two tensors of any shapes.
        """


_watchers: list[Watcher] = []


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Pass all reads inside the context to a watcher. With nested contexts, the innermost watcher gets them."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.pop()


def is_active() -> bool:
    """Whether a capture observes or traces the current run."""
    return bool(_watchers)


def holds(condition: Tensor | bool, name: str) -> bool:
    """Whether a condition holds in every element.

    Args:
        condition: a tensor of any shape and dtype, or a plain boolean, for which nothing is read.
        name: the name of the guard: a statement that may hold, such as ``"the mask is full"``. Different places have different names.
    """
    if not isinstance(condition, Tensor):
        return bool(condition)
    every = condition.all()
    return bool(_watchers[-1].answer(name, Tensor.__bool__, every) if _watchers else every)


def number(value: Tensor, name: str) -> float:
    """The number in a tensor with one element.

    Args:
        value: a tensor with one element, of any dtype.
        name: the name of the guard.
    """
    return float(_watchers[-1].answer(name, Tensor.item, value) if _watchers else value)


def equal(first: Any, second: Any, name: str) -> bool:
    """Whether two values are equal in every element. An object equals itself without a read.

    Args:
        first, second: numbers, None, or tensors. Tensors of different shapes are not equal; a number is compared with each element.
        name: the name of the guard.
    """
    if first is second or (type(first) is float and first == second):
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape != second.shape:
            return False
        return bool(_watchers[-1].answer(name, torch.equal, first, second) if _watchers else torch.equal(first, second))
    if first is None or second is None:
        return False
    same = first == second
    return holds(same if isinstance(same, bool) else torch.as_tensor(same), name)
