"""A few draws of a teacher in memory, each of which serves several steps of the student.

A pool of 2m draws, for m uses of each. Steps go through the pool in rounds, in an order that is shuffled anew for each round, so that
successive steps see different rows. The pool begins with two draws, and each round adds two until there are 2m; from then on each
round replaces the two that have served m steps. So the teacher's work is spread evenly, and no draw serves fewer steps than another.

Each draw has a seed of its own, taken from torch's random stream. So the pool is a function of seeds and arguments, which is all that
a checkpoint needs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any

import pyro
import torch

from pyro_kd.errors import CheckpointError
from pyro_kd.losses.packing import owned
from pyro_kd.losses.teacher_draws import TeacherDraw
from pyro_kd.utils.randomness import keeping_random_state

__all__ = ["DrawPool", "PooledDraw", "checked_reuse", "drawn_once", "seeded"]


@dataclass
class PooledDraw:
    """A place in a pool.

    Attributes:
        seed: of the draw.
        call: the arguments, on tensors of their own.
        uses: how many more steps the draw serves.
        draw: the draw; None until it is needed, after a checkpoint was loaded.
        is_restored: whether it is from a checkpoint.
    """

    seed: int
    call: tuple[tuple[Any, ...], dict[str, Any]]
    uses: int
    draw: TeacherDraw | None = None
    is_restored: bool = False


class DrawPool:
    """Decides which draw of the teacher a step uses.

    Args:
        reuse: how many steps each draw serves, at least 2.

    Attributes:
        options: what its draws depend on besides arguments, such as the versions of the teacher's parameters; None for a pool of a
            checkpoint, before its first use.
        count: how many steps were served.
        places: the draws; None where there is none yet.

    Example:
        >>> pool = DrawPool(2)
        >>> [pool.place(step) for step in range(10)]
        [0, 1, 3, 1, 2, 0, 1, 0, 3, 2]
    """

    def __init__(self, reuse: int, options: Any = None) -> None:
        self.reuse = reuse
        self.options = options
        self.count = 0
        self.places: list[PooledDraw | None] = [None] * (2 * reuse)

    @classmethod
    def of(cls, pool: "DrawPool | None", reuse: int, options: Any) -> "DrawPool":
        """The pool itself if it is one for so many steps and these options, or a new one."""
        if pool is None or pool.reuse != reuse or (pool.options is not None and pool.options != options):
            return cls(reuse, options)
        pool.options = options
        return pool

    def next(self, args: Any, kwargs: Any, record: Callable[[Any, Any], TeacherDraw]) -> TeacherDraw:
        """The draw of the next step.

        Args:
            args, kwargs: arguments of the programs in this step. They are used if a new draw is due, and otherwise those that the
                draw was made with.
            record: makes a draw for arguments, from the random streams.
        """
        index = self.place(self.count)
        place = self.places[index]
        if place is None or place.uses == 0:
            seed = int(torch.randint(2**62, ()))
            place = PooledDraw(seed, owned((tuple(args), dict(kwargs))), self.reuse)
        if place.draw is None:
            with seeded(place.seed), _remaking() if place.is_restored else nullcontext():
                place.draw = record(*place.call)
        self.places[index] = place
        self.count += 1
        place.uses -= 1
        return place.draw

    def place(self, step: int) -> int:
        """The number of the place that a step uses, counted from 0."""
        round_, index = self._round(step)
        order = self._order(round_)
        if round_ and order[0] == self._order(round_ - 1)[-1]:
            order = (order[1], order[0], *order[2:])
        return order[index]

    def _round(self, step: int) -> tuple[int, int]:
        """The round of a step, and the step's number in it, both counted from 0. The first rounds have 2, 4, ..., 2m steps."""
        growing = self.reuse * (self.reuse + 1)
        if step >= growing:
            later, index = divmod(step - growing, len(self.places))
            return self.reuse + later, index
        round_ = (isqrt(4 * step + 1) - 1) // 2
        return round_, step - round_ * (round_ + 1)

    def _order(self, round_: int) -> tuple[int, ...]:
        return _shuffled(min(2 * (round_ + 1), len(self.places)), round_)


@lru_cache(maxsize=16)
def _shuffled(size: int, round_: int) -> tuple[int, ...]:
    """The places of a round, in the order in which steps use them."""
    return tuple(torch.randperm(size, generator=torch.Generator().manual_seed(round_)).tolist())


@contextmanager
def _remaking() -> Iterator[None]:
    """Stands around a draw with the arguments of a checkpoint.

    Raises:
        CheckpointError: the teacher does not take them.
    """
    try:
        yield
    except Exception as error:  # of any type: the program is the user's
        raise CheckpointError(
            f"a draw of the teacher that the checkpoint holds cannot be made again ({type(error).__name__}: {error}). Resume from "
            "the checkpoint before it, or leave out reuse."
        ) from error


def drawn_once(args: Any, kwargs: Any, record: Callable[[Any, Any], TeacherDraw]) -> TeacherDraw:
    """A draw for one step, with a seed of its own as those of a pool; arguments as for :meth:`DrawPool.next`."""
    with seeded(int(torch.randint(2**62, ()))):
        return record(args, kwargs)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set every random generator inside the context, and leave them as they were."""
    with keeping_random_state():
        pyro.set_rng_seed(seed % 2**32)
        torch.manual_seed(seed)
        yield


def checked_reuse(loss: Any, reuse: Any) -> int:
    """The option ``reuse`` of a loss.

    Raises:
        TypeError, ValueError: it is no number of steps, or the loss cannot reuse a draw.
    """
    if isinstance(reuse, bool) or not isinstance(reuse, int):
        raise TypeError(
            f"reuse must be a whole number of steps that each draw of the teacher serves, such as 8, not {reuse!r:.60}"
        )
    if reuse < 1:
        raise ValueError(f"reuse must be at least 1, where each step has a draw of its own, not {reuse}")
    reason = loss.refuses_draws(stored=False) if reuse > 1 else ""
    if reason:
        raise TypeError(f"{type(loss).__name__} takes no reuse: {reason}. Leave it out.")
    return reuse
