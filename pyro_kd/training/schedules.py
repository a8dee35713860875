"""Functions of the training step for what changes: weights of objectives and latents, an annealed KL, teacher forcing."""

import math
from collections.abc import Callable

__all__ = ["cosine", "linear", "switch"]


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


def switch(start: float, end: float, step: int) -> Callable[[int], float]:
    """``start`` before a step, and ``end`` from it on.

    Example:
        >>> from pyro_kd.training import switch
        >>> [switch(1.0, 0.0, 4)(step) for step in (0, 3, 4, 9)]
        [1.0, 1.0, 0.0, 0.0]
    """
    _check(step)
    return lambda now: start if now < step else end


def _check(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, not {steps}")
