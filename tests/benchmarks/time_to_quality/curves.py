"""The time at which a curve of quality against time reaches a quality."""

import statistics
from collections.abc import Sequence

__all__ = ["WINDOW", "final_quality", "time_to"]

WINDOW = 3
"""Checkpoints whose median decides, so that one lucky checkpoint does not."""


def final_quality(values: Sequence[float]) -> float:
    """The median of the last checkpoints.

    Args:
        values: at the checkpoints in order, the smaller the better.
    """
    return statistics.median(values[-WINDOW:])


def time_to(seconds: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """The first time at which the curve is as good as the target, and stays so: None if it never is.

    The curve has reached the target at the first checkpoint that is as good, if the median of it and the two after it is as good too;
    at the end of the curve there are fewer after it. Between this checkpoint and the one before, the curve is taken for a straight
    line. Curves of training are convex, so that this is late rather than early.

    Args:
        seconds: of the checkpoints, in order.
        values: likewise, the smaller the better; NaN is never good.
        target: a value.
    """
    for index, value in enumerate(values):
        if not (value <= target and statistics.median(values[index : index + WINDOW]) <= target):
            continue
        if index == 0:
            return seconds[0]
        before = values[index - 1]
        if not before > target:  # it was as good for a moment, or is NaN
            return seconds[index]
        share = (before - target) / (before - value)
        return seconds[index - 1] + share * (seconds[index] - seconds[index - 1])
    return None
