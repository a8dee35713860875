"""When a loss looks for random draws between sample sites, and how it warns about those that are not shared.

A tape under the whole program (:class:`~pyro_kd.noise.between.ProgramTape`) sees every draw, and costs a few microseconds per
torch operation. So it runs in the first call of a pair of programs, and for as long as the teacher draws between its sites.
In all other calls only the random streams are watched, at a negligible cost.
"""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pyro.poutine.messenger import unwrap

from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.reaching import Generator, Reached
from pyro_kd.noise.between import FOREIGN, BetweenDraw, unshared
from pyro_kd.noise.messengers import ReplayNoiseMessenger
from pyro_kd.noise.record import NoiseRecord
from pyro_kd.utils.randomness import have_moved, stream_states
from pyro_kd.utils.warning import warn_once

__all__ = ["BetweenSites"]


class BetweenSites:
    """What is known about the draws of a student and a teacher between their sites.

    Args:
        student, teacher: the programs.
        told: the warnings given so far; new ones are added.

    Attributes:
        looks: whether the next run has a tape under the whole of both programs.
        watches_student: whether the student's own draws are still unknown, so that its random streams are watched.
        is_alarmed: whether the student's random streams have advanced in a run without a tape.
    """

    def __init__(self, student: Any, teacher: Any, told: set[str]) -> None:
        self.looks = True
        self.watches_student = True
        self.is_alarmed = False
        self._told = told
        self._generators = Reached(_inside(student), _inside(teacher)).generators  # of NumPy and Python
        self._states: dict[Generator, bytes] = {}

    def begin(self) -> None:
        """Note the state of the generators. To be called before each run of the two programs."""
        if self.looks:
            self._states = {generator: pickle.dumps(generator) for generator in self._generators}

    @contextmanager
    def around_student(self, taught: NoiseRecord, replay: ReplayNoiseMessenger) -> Iterator[None]:
        """Note what the student draws between its sites inside the context, in which it runs on the teacher's noise.

        Args:
            taught: the teacher's record.
            replay: the handler that the student runs in.
        """
        before = stream_states() if self.watches_student and not replay.looks_between else []
        yield
        if replay.looks_between:
            self.note(taught, replay.between, is_fresh="*" in replay.fresh)
        elif before and have_moved(before):
            self.alarm()

    def alarm(self) -> None:
        """Note that the student has drawn between its sites in a run without a tape: the next run finds out where."""
        self.looks = self.is_alarmed = True

    def note(self, teacher: NoiseRecord, student: Sequence[BetweenDraw], *, is_fresh: bool = False) -> None:
        """Note what a run with both tapes has found.

        Args:
            teacher: its record.
            student: its draws between sites.
            is_fresh: whether the loss lets everything without a counterpart be the student's own, by ``fresh="*"``: as a simulator is
                taught by its draws, whatever they are made from. Then there is nothing to warn of.

        Warns:
            UserWarning: once for each way in which draws are not shared.
        """
        if not self.is_alarmed:  # after an alarm, all draws count: they occur in later runs as well
            student = [draw for draw in student if not draw.may_stay]
        # Where a program seeds itself, watching the streams could mistake the seeding for a draw, or miss a draw.
        self.looks = bool(teacher.between or teacher.lost_between or teacher.is_seeded)
        # Otherwise the student's draws are known, or are those of its fresh sites.
        self.watches_student = not student and not self.is_alarmed
        text = "" if is_fresh else unshared([*teacher.lost_between, *self._moved(), *student])
        if text:
            warn_once(text, self._told)

    def _moved(self) -> list[BetweenDraw]:
        """What the programs have drawn from their own generators since :meth:`begin`."""
        return [
            BetweenDraw("", f"the {type(generator).__name__} {name!r}", (), "", FOREIGN)
            for generator, name in self._generators.items()
            if pickle.dumps(generator) != self._states.get(generator)
        ]


def _inside(program: Any) -> Any:
    frozen = unwrap(program)
    return frozen.program if isinstance(frozen, FrozenProgram) else program
