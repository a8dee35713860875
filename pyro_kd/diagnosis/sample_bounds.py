"""K-sample bounds on the KL between two programs, for several K, as lines of a report.

Input: two programs and one run of both. Output: :class:`SampleBounds`, which :mod:`pyro_kd.diagnosis.bounds` puts beside the others.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from pyro import poutine

from pyro_kd.errors import PyroKDError, UnsupportedDivergenceError
from pyro_kd.losses import MultiSampleKD
from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.losses.rows import drawn_sites, row_plates
from pyro_kd.losses.sample_runs import SampledRun
from pyro_kd.metrics import Estimate
from pyro_kd.utils.display import first_line

__all__ = ["SampleBounds", "check_sample_numbers", "sample_bounds"]

Program = Callable[..., Any]

MAX_DRAWN = 2**24
"""How many numbers K runs in one plate may draw, in both programs together."""
FEWEST_ROWS = 1000
"""From fewer rows, all runs together, no bound is estimated: its mean may be decided by rare values, which would be missed."""
_FEWEST_RUNS = 5


class SampleBounds(NamedTuple):
    """K-sample bounds by K.

    Attributes:
        bounds: the estimates; None where one cannot be computed.
        reasons: why a bound is None, by K.
    """

    bounds: dict[int, Estimate | None]
    reasons: dict[int, str]


def check_sample_numbers(numbers: Sequence[int]) -> list[int]:
    """The numbers K in increasing order.

    Raises:
        TypeError, ValueError: one is not a whole number of at least 2.
    """
    wanted = "sample_numbers must be whole numbers K of at least 2, such as (4, 16, 64), or () for no K-sample bounds"
    if isinstance(numbers, str | int):
        raise TypeError(f"{wanted}, not {numbers!r:.60}")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{wanted}, not {number!r:.60}")
        if number < 2:
            raise ValueError(f"{wanted}, not {number}" + "; one sample is the surrogate bound" * (number == 1))
    return sorted(set(numbers))


def sample_bounds(
    numbers: Sequence[int],
    student: Program,
    teacher: Program,
    args: Any,
    kwargs: Any,
    *,
    run: PairedRun,
    over_runs: Callable[[DistillationLoss, int], Estimate],
    num_samples: int,
    options: Mapping[str, Any],
) -> SampleBounds:
    """Estimate the bound of :class:`~pyro_kd.losses.multi_sample.MultiSampleKD` for each K.

    Where the rows of the batch serve each other as samples, each bound takes ``num_samples`` runs, and the loss bounds their memory.
    Otherwise each run is one of K times as many rows. The bounds of large programs then take fewer runs, and there is no bound where
    a single run would draw more than :data:`MAX_DRAWN` numbers.

    Args:
        numbers: the numbers K, each at least 2.
        student, teacher: the programs.
        args, kwargs: arguments of both.
        run: a run of both.
        over_runs: ``f(loss, runs)`` estimates a loss.
        num_samples: the number of runs.
        options: of the losses, ``targets`` among them.
    """
    if not numbers:
        return SampleBounds({}, {})
    try:
        rows = _rows_of(run)
        _require_use(run, rows * num_samples)
        with torch.no_grad(), poutine.block():
            (probe,) = MultiSampleKD(num_samples=2, **options).particles(student, teacher, *args, **kwargs)
    except PyroKDError as error:
        return SampleBounds(dict.fromkeys(numbers), dict.fromkeys(numbers, first_line(error)))
    serving = _rows_that_serve(probe.run)
    fewest = max(_FEWEST_RUNS, ceil(FEWEST_ROWS / rows))
    drawn = sum(site["value"].numel() for trace in (run.student, run.teacher) for _, site in drawn_sites(trace))
    found = SampleBounds({}, {})
    for number in numbers:
        size = drawn * number
        try:
            if number > serving and size > MAX_DRAWN:
                raise UnsupportedDivergenceError(
                    f"one run of {number} samples draws {size:,} numbers, more than {MAX_DRAWN:,}. Pass fewer rows to the programs"
                )
            runs = num_samples if number <= serving else min(num_samples, max(fewest, MAX_DRAWN // size))
            found.bounds[number] = over_runs(MultiSampleKD(num_samples=number, **options), runs)
        except PyroKDError as error:
            found.bounds[number], found.reasons[number] = None, first_line(error)
    return found


def _rows_of(run: PairedRun) -> int:
    """The number of rows of a run."""
    if not run.pairs:
        raise UnsupportedDivergenceError("which targets a run has depends on its draws")
    return prod(run.pairs[0].p.batch_shape[dim] for dim in row_plates(run))


def _require_use(run: PairedRun, rows: int) -> None:
    """Raise UnsupportedDivergenceError where the bounds of K samples would say nothing, or nothing reliable."""
    targets = {pair.name for pair in run.pairs if pair.is_target}
    latents = [name for name, _ in drawn_sites(run.teacher) if name not in targets]
    if not latents and not list(drawn_sites(run.student)):
        raise UnsupportedDivergenceError("there are no latents, so that they are equal to the surrogate bound")
    if rows < FEWEST_ROWS:
        raise UnsupportedDivergenceError(
            f"all runs together have {rows} rows, too few for a reliable limit: it takes {FEWEST_ROWS}. Raise num_samples, or pass "
            "more rows to the programs"
        )


def _rows_that_serve(run: PairedRun) -> int:
    """The number of rows of the batch that serve each other as samples; 0 where each sample has a run of its own."""
    if not isinstance(run, SampledRun) or run.sample_dim is not None or run.others:
        return 0
    return _rows_of(run)
