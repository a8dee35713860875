"""How long a fit is, from what the user asked for."""

import operator
from typing import Any

__all__ = ["Duration"]


class Duration:
    """The number of steps of a fit.

    Args:
        steps: number of steps of this fit, or None.
        total_steps: number of steps of all fits together, this one included, or None. If both are None: one pass through the batches.
        batches: the batches, or None.
        accumulate: number of batches per step.

    Raises:
        TypeError: both numbers are given, or neither and the batches have no length, or one is no whole number.
        ValueError: a number is below 1, or there are fewer batches than one step takes.
    """

    def __init__(self, steps: Any, total_steps: Any, batches: Any, accumulate: int) -> None:
        if steps is not None and total_steps is not None:
            raise TypeError("pass either steps, of this fit, or total_steps, of all fits together")
        self._is_total = total_steps is not None
        if total_steps is not None:
            self._number = _count(total_steps, "total_steps")
        else:
            self._number = _one_pass(batches, accumulate) if steps is None else _count(steps, "steps")

    def end(self, begin: int) -> int:
        """The number of steps after which a fit ends that began after ``begin`` steps."""
        return self._number if self._is_total else begin + self._number


def _count(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, and must be a whole number: {name}=500, or int({value!r})") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, not {number}")
    return number


def _one_pass(batches: Any, accumulate: int) -> int:
    try:
        number = len(batches)
    except TypeError as error:  # a DataLoader of an IterableDataset has __len__, which raises
        what = "there are no batches to count" if batches is None else "the batches have no length"
        raise TypeError(f"steps is needed, since {what}: fit(..., steps=1000)") from error
    if number < accumulate:
        raise ValueError(
            f"{number} batches are fewer than one step takes, accumulate={accumulate}: pass more batches, or steps"
        )
    return number // accumulate
