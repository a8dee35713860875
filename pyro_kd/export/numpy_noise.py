"""Draws of the noise that an exported program takes, with NumPy alone.

The laws are those of :class:`~pyro_kd.noise.laws.NoiseLaw`. docs/export.md has the same in a few lines, for machines without pyro_kd.
"""

from collections.abc import Callable
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from pyro_kd.errors import UnsupportedExportError
from pyro_kd.export.description import Description, size_at

__all__ = ["draw_noise"]

Array = NDArray[np.generic]

_LAWS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "uniform": lambda rng, shape: rng.random(shape),
    "exponential": lambda rng, shape: rng.standard_exponential(shape),
    "cauchy": lambda rng, shape: rng.standard_cauchy(shape),
    "permutation": lambda rng, shape: rng.permutation(shape[0]),
}


def draw_noise(description: Description, rows: int, rng: np.random.Generator) -> dict[str, Array]:
    """Draw the noise for a number of rows.

    Args:
        description: of the exported program.
        rows: number of rows; of no consequence where the program has a fixed number of them.
        rng: NumPy's random generator.

    Returns:
        The noise by the names of the inputs, in their order, of the shapes and data types of the description.

    Raises:
        UnsupportedExportError: the number of rows is open, and ``rows`` is none.
    """
    if description.has_rows and (isinstance(rows, bool) or not isinstance(rows, Integral) or rows < 1):
        raise UnsupportedExportError(f"the number of rows must be a whole number of at least 1, not {rows!r:.40}")
    drawn = {}
    for item in description.noise:
        noise = np.asarray(_LAWS[item.law](rng, size_at(item.shape, rows))).astype(item.dtype)
        if item.law == "uniform":  # of the open interval: quantile functions are infinite at its ends
            eps = np.finfo(noise.dtype).eps
            noise = noise.clip(eps / 4, 1 - eps / 2)
        drawn[item.name] = np.asarray(
            noise
        )  # clip makes a number of an array without dimensions, which ONNX Runtime refuses
    return drawn
