"""The comparison of an exported program with the Pyro program, on the same noise: how far they differ, and how fast they are."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_kd.errors import ExportMismatchError

__all__ = ["TOLERANCES", "Case", "check_cases", "rows_per_second"]

TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 1e-1, torch.float32: 1e-5, torch.float64: 1e-10}
"""The largest difference by data type, relative to the largest absolute value of the output, or to 1 if that is larger."""


@dataclass(frozen=True)
class Case:
    """Inputs of a program, and what the Pyro program gives for them.

    Attributes:
        rows: the number of rows.
        inputs: noise and arguments by name, of any shapes.
        expected: the outputs by name, of any shapes.
    """

    rows: int
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]


def check_case(case: Case, found: Mapping[str, Any], tolerance: float | None) -> tuple[float, str]:
    """Compare outputs.

    Args:
        case: with the outputs to expect.
        found: the outputs, tensors of any shapes by name.
        tolerance: see :data:`TOLERANCES`; None takes the one there.

    Returns:
        The largest difference; and what is wrong, an empty text if nothing is.
    """
    largest, wrong = 0.0, ""
    for name, given in case.expected.items():
        value, expected = torch.as_tensor(found[name]).cpu(), given.cpu()
        if value.shape != expected.shape or value.dtype != expected.dtype:
            return float("inf"), (
                f"{name!r} has shape {tuple(value.shape)} and type {value.dtype} with {case.rows} rows, and in Pyro "
                f"{tuple(expected.shape)} and {expected.dtype}"
            )
        difference, scale = _difference(value, expected)
        largest = max(largest, difference)
        limit = TOLERANCES.get(expected.dtype, 0.0) if tolerance is None else tolerance
        if not difference <= limit * max(scale, 1.0):
            wrong = wrong or f"{name!r} differs by {difference:.3g} with {case.rows} rows, and {limit:.0e} is allowed"
    return largest, wrong


def _difference(value: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference, where equal infinities and NaN are no difference, and the largest finite absolute value."""
    if not expected.numel():
        return 0.0, 0.0
    one, two = value.double(), expected.double()
    same = (one == two) | (one.isnan() & two.isnan())
    gap = torch.where(same, 0.0, (one - two).abs())
    finite = two[two.isfinite()]
    return float(gap.max().nan_to_num(nan=float("inf"))), float(finite.abs().max()) if finite.numel() else 0.0


def check_cases(
    cases: Sequence[Case], run: Callable[[Case], Mapping[str, Any]], tolerance: float | None, what: str
) -> float:
    """Check several cases, and return the largest difference.

    A discrete value changes where rounding moves a probability across its noise, which no exact program avoids. So the program
    is wrong only if all cases of a number of rows are.

    Args:
        cases: at least two for each number of rows.
        run: ``run(case)`` gives the outputs of the exported program.
        tolerance: see :func:`check_case`.
        what: what was exported, for the error.

    Raises:
        ExportMismatchError: the exported program gives other values.
    """
    largest, good, faults = 0.0, set[int](), dict[int, str]()
    for case in cases:
        difference, wrong = check_case(case, run(case), tolerance)
        if wrong:
            faults.setdefault(case.rows, wrong)
        else:
            largest, good = max(largest, difference), good | {case.rows}
    for rows, wrong in faults.items():
        if rows not in good:
            raise ExportMismatchError(
                f"{what} gives other values than the Pyro program on the same noise: {wrong}. Nothing was saved. Look for state "
                "that a run changes, for numbers that depend on the number of rows, and for branches on values; or pass tolerance=."
            )
    return largest


def rows_per_second(run: Callable[[], Any], rows: int, seconds: float = 0.1) -> float:
    """Rows a second of a run, the best of several."""
    best, started = float("inf"), time.perf_counter()
    while True:
        before = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - before)
        if now - started > seconds:
            return rows / best
