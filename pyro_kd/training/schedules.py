"""Functions of the training step for what changes: weights of objectives and latents, an annealed KL, teacher forcing."""

import math
from collections.abc import Callable, Collection
from numbers import Integral
from typing import Any

__all__ = ["cosine", "linear", "require_whole", "switch", "switches", "switching_at"]


def linear(start: float, end: float, steps: int) -> Callable[[int], float]:
    """A straight line from ``start`` to ``end`` over ``steps`` steps, and ``end`` after them.

    Example:
        >>> from pyro_kd.training import linear
        >>> [linear(0.0, 1.0, 4)(step) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    _check(steps)
    return lambda step: start + (end - start) * min(step / steps, 1.0)


def cosine(start: float, end: float, steps: int) -> Callable[[int], float]:
    """Half a cosine from ``start`` to ``end`` over ``steps`` steps, and ``end`` after them.

    Example:
        >>> from pyro_kd.training import cosine
        >>> [round(cosine(1.0, 0.0, 4)(step), 3) for step in (0, 2, 4, 9)]
        [1.0, 0.5, 0.0, 0.0]
    """
    _check(steps)
    return lambda step: end + (start - end) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def switch(start: Any, end: Any, step: int) -> Callable[[int], Any]:
    """``start`` before a step, and ``end`` from it on. A trainer's optimiser starts anew there, as with no other schedule.

    Example:
        >>> from pyro_kd.training import switch
        >>> [switch(1.0, 0.0, 4)(step) for step in (0, 3, 4, 9)]
        [1.0, 1.0, 0.0, 0.0]
    """
    _check(step)
    return switching_at((step,), lambda now: start if now < step else end)


def switching_at(steps: Collection[int], schedule: Callable[[int], Any]) -> Callable[[int], Any]:
    """A schedule that says at which steps something else is minimised from then on; see :func:`switches`."""
    schedule.switches_at = frozenset(steps)  # type: ignore[attr-defined]
    return schedule


def switches(schedule: Any, step: int) -> bool:
    """Whether a weight or schedule switches at a step. A function of the user's, which may go up and down, says nothing of it."""
    return step > 0 and step in getattr(schedule, "switches_at", ())


def _check(steps: int) -> None:
    require_whole(steps, "a schedule's step")
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, not {steps}")


def require_whole(step: Any, what: str) -> None:
    """Raise ValueError where a step is no whole number: the trainer's steps are, and would pass it by.

    Args:
        step: the number.
        what: what it is, for the error.
    """
    if isinstance(step, bool) or not isinstance(step, Integral):
        raise ValueError(f"{what} must be a whole number, such as steps // 4, not {step!r:.40}")
