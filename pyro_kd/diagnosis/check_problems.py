"""The problems that a check before training collects, and the handlers that note one where a loss would stop.

A check runs each stage of a loss inside :meth:`Problems.collecting`. The student runs inside the lenient handlers.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_kd.diagnosis.check_report import Problem
from pyro_kd.errors import PyroKDError
from pyro_kd.losses.giving import CollectingReplayMessenger, GiveMessenger

__all__ = ["LenientGiveMessenger", "LenientReplayMessenger", "Problems"]


class Problems:
    """The errors and warnings of a check.

    Attributes:
        found: all problems, in the order in which they were found.
        refused: why a site of the student, by its name, cannot be given the teacher's value.
    """

    def __init__(self) -> None:
        self.found: list[Problem] = []
        self.refused: dict[str, BaseException] = {}
        self._failed: tuple[Exception | None, str] = (None, "")

    @contextmanager
    def while_running(self, program: str) -> Iterator[None]:
        """Run a program: where it raises an error, the text of the problem says which program it was."""
        try:
            yield
        except Exception as error:
            self._failed = error, program
            raise

    @property
    def has_errors(self) -> bool:
        """Whether one of them is an error."""
        return any(problem.is_error for problem in self.found)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep the errors and warnings that are raised inside the context."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except Exception as error:
                self.add(error)
        self.found += [Problem(False, str(w.message)) for w in caught if issubclass(w.category, UserWarning)]

    def add(self, error: Exception) -> None:
        """Keep an error."""
        text = str(error)
        if not isinstance(error, PyroKDError):
            text = " ".join(text.partition("\nTrace Shapes:")[0].split())  # Pyro's table of shapes does not help
            text = f"{type(error).__name__}: {text}"
            text = f"the {self._failed[1]} fails by itself: {text}" if error is self._failed[0] else text
        self.found.append(Problem(True, text, error))

    def drop_repeated(self, name: str, compared: list[Problem]) -> None:
        """Drop what the comparison of a site has found, if the site could not be given its value: training says that alone."""
        refused = self.refused.get(name)
        if refused is not None:
            repeated = [problem for problem in compared if type(problem.error) is type(refused)]
            self.found = [problem for problem in self.found if problem not in repeated or problem.error is refused]

    def errors_first(self) -> tuple[Problem, ...]:
        """All problems, each once."""
        once: dict[tuple[bool, str], Problem] = {}
        for problem in self.found:
            once.setdefault((problem.is_error, problem.text), problem)
        return tuple(sorted(once.values(), key=lambda problem: not problem.is_error))


class LenientReplayMessenger(CollectingReplayMessenger):
    """Replay noise. A site that cannot share noise is noted as a problem, and draws its own."""

    def __init__(self, problems: Problems, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.problems = problems

    def _sample(self, msg: Message[..., Any]) -> None:
        with self.problems.collecting():
            super()._sample(msg)
            return
        if msg["value"] is None:
            self._draw(str(msg["name"]), self._broadcast(msg), msg)


class LenientGiveMessenger(GiveMessenger):
    """Give values. One that the student cannot take is noted as a problem, and the student draws its own."""

    def _value(self, name: str, msg: Any) -> Tensor:
        try:
            return super()._value(name, msg)
        except Exception as error:
            problems = self._replay.problems  # type: ignore[attr-defined]
            problems.add(error)
            problems.refused[name] = error
        return self._own_draw(name, msg)
