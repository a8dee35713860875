"""Guards: reads of tensor values on which a run branches. They are answered once, and verified in every call of the graph.

A trace follows a single path of Python code, so code that reads the value of a tensor (``if mask.all():``) cannot be traced. The
reads of this package (:mod:`pyro_kd.utils.guards`) and of Pyro and torch (:mod:`pyro_kd.capture.library_reads`) nearly always have
the same answer. :class:`ObservedGuards` notes the answers of an ordinary run. :class:`TracedGuards` repeats them while the run is
traced, and collects the conditions under which they are right, which become an output of the graph. If one of them does not hold in
a call, the call is repeated without the graph.

Knows reads and answers, but neither programs nor graphs.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_kd.capture.library_reads import LibraryReads
from pyro_kd.utils.guards import watched_by

__all__ = ["Answers", "NewGuardError", "ObservedGuards", "TracedGuards"]

Answers = Mapping[str, Sequence[Any]]
"""The answers of each guard in the order of a run, by the name of the guard."""


class NewGuardError(RuntimeError):
    """A traced run reads a value that the observed run has not read."""


_W = TypeVar("_W", bound="_Watching")


class _Watching:
    """A context in which every guard asks :meth:`answer`."""

    def __enter__(self: _W) -> _W:
        self._under = ExitStack()
        self._under.enter_context(watched_by(self))
        self._under.enter_context(LibraryReads(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._under.__exit__(*exception)

    def answer(self, name: str, read: Callable[..., Any], *tensors: Tensor) -> Any:
        """The answer with which a guard continues."""
        raise NotImplementedError


class ObservedGuards(_Watching):
    """Notes the answers of a run.

    Attributes:
        answers: the answers of each guard in the order of the run, by the name of the guard.
    """

    def __init__(self) -> None:
        self.answers: defaultdict[str, list[Any]] = defaultdict(list)

    def answer(self, name: str, read: Callable[..., Any], *tensors: Tensor) -> Any:
        """The true answer."""
        answer = read(*tensors)
        self.answers[name].append(answer)
        return answer


class TracedGuards(_Watching):
    """Gives the answers of an observed run to a run that is traced.

    Args:
        answers: the answers of :class:`ObservedGuards`. The traced run may lack some of its guards: some checks are made only once.

    Attributes:
        conditions: for each answer, whether it is the true one, a boolean scalar.
    """

    def __init__(self, answers: Answers) -> None:
        self.conditions: list[Tensor] = []
        self._answers: dict[str, Iterator[Any]] = {name: iter(noted) for name, noted in answers.items()}

    def answer(self, name: str, read: Callable[..., Any], *tensors: Tensor) -> Any:
        """The noted answer.

        Raises:
            NewGuardError: no answer was noted.
        """
        answer = next(self._answers.get(name, iter(())), None)
        if answer is None:
            raise NewGuardError(f"guard {name!r} did not occur in the observed run: the traced run takes a different path")
        with torch.no_grad():
            if read is not torch.equal:
                self.conditions.append((tensors[0] == answer).reshape(()))
            elif tensors[0].shape == tensors[1].shape:
                self.conditions.append((tensors[0] == tensors[1]).all() == answer)
        return answer
