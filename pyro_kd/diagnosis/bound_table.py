"""The table of bounds on the KL between two programs, and the interval that follows from them.

Input: the estimates that :func:`~pyro_kd.diagnosis.bounds.bound_report` makes. Output: limits at a level, text and plain values.
Knows no programs.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pyro_kd.diagnosis.lower_bound import LowerBound
from pyro_kd.diagnosis.program_cost import ProgramCost
from pyro_kd.metrics import Estimate
from pyro_kd.utils.tables import figure, format_table, html_table, plus_minus

__all__ = ["BoundReport", "samples_line"]

_HEADER = ["KL(teacher || student)", "nats per row", "limit"]


def samples_line(number: int) -> str:
    """The name of the line of the bound of K samples."""
    return f"{number} samples"


@dataclass(frozen=True)
class BoundReport:
    """The table that :func:`bound_report` returns. Its figures are in nats per row.

    Attributes:
        surrogate: the surrogate bound on KL(teacher || student), the target terms of SurrogateKD.
        local: the local bound, the KL of the joint distributions; None where latents cannot be compared.
        exact: KL(teacher || student) of the targets; None where latents cannot be summed out.
        rows: number of rows per call: the product of the sizes of the plates that hold every site; 1 where there is none.
        samples: the K-sample bounds of MultiSampleKD by K; None where one cannot be computed.
        reasons: why a figure is None, by the figure's name, such as ``"exact"`` or ``"16 samples"``.
        lower: the lower bound of a classifier; None where there are too few rows.
        others: further upper bounds by name.
        level: of the interval.
        distance: the mean squared distance of the targets on shared noise, per row; None where the lower bound is. It bounds the
            squared Wasserstein-2 distance of the two laws from above.
        costs: memory and time of the student and the teacher, by name.
        rows_drawn: number of rows that a call draws: fewer than ``rows`` where a plate takes a subsample; None for as many.
    """

    surrogate: Estimate
    local: Estimate | None
    exact: Estimate | None
    rows: int
    reasons: Mapping[str, str] = field(default_factory=dict)
    lower: LowerBound | None = None
    others: Mapping[str, Estimate] = field(default_factory=dict)
    level: float = 0.95
    distance: Estimate | None = None
    costs: Mapping[str, ProgramCost] = field(default_factory=dict)
    samples: Mapping[int, Estimate | None] = field(default_factory=dict)
    rows_drawn: int | None = None

    @property
    def upper_bounds(self) -> dict[str, Estimate]:
        """All bounds from above, by name."""
        return {name: bound for name, bound in self._above().items() if bound is not None}

    @property
    def upper_limits(self) -> dict[str, float]:
        """The upper confidence limit of each bound from above, by name. All of them hold together."""
        bounds = self.upper_bounds
        confidence = 1 - (1 - self.level) / 2 / len(bounds)
        return {name: _upper_limit(bound, confidence) for name, bound in bounds.items()}

    @property
    def interval(self) -> tuple[float, float]:
        """An interval that covers the KL with probability ``level``: from the lower limit to the least of the upper limits."""
        return (self.lower.limit if self.lower else 0.0), max(min(self.upper_limits.values()), 0.0)

    @property
    def is_inconsistent(self) -> bool:
        """Whether the lower limit is above an upper limit: then one of the bounds does not hold for these programs."""
        low, high = self.interval
        return low > high

    def __str__(self) -> str:
        return "\n".join([format_table(_HEADER, self._cells()), *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._cells(), self._notes())

    def _above(self) -> dict[str, Estimate | None]:
        """All lines of bounds from above, by name: the more samples, the tighter."""
        samples = {samples_line(number): self.samples[number] for number in sorted(self.samples, reverse=True)}
        return {**self.others, **samples, "local bound": self.local, "surrogate bound": self.surrogate}

    def _cells(self) -> list[list[str]]:
        limits = {name: f"<= {figure(limit)}" for name, limit in self.upper_limits.items()}
        lower = [plus_minus(self.lower.estimate), f">= {figure(self.lower.limit)}"] if self.lower else ["-", "-"]
        above = [[name, plus_minus(bound), limits.get(name, "-")] for name, bound in self._above().items()]
        return [["lower bound", *lower], ["exact", plus_minus(self.exact), "-"], *above]

    def _notes(self) -> list[str]:
        low, high = self.interval
        percent = f"{100 * self.level:.3g} %"
        notes = [f"the KL lies between {figure(low)} and {figure(high)} nats per row, at a level of {percent}"]
        if self.is_inconsistent:
            notes = [_INCONSISTENT.format(figure(low), figure(high), percent)]
        runs = self.surrogate.num_samples
        fewer = [f"{bound.num_samples} for {name}" for name, bound in self.upper_bounds.items() if bound.num_samples < runs]
        less = f" ({', '.join(fewer)})" * bool(fewer)
        part = "" if self.rows_drawn in (None, self.rows) else f"{self.rows_drawn} of "
        notes.append(f"± standard error over {runs} runs{less} of {part}{self.rows} row{'s' * (self.rows != 1)}")
        if self.distance is not None:
            notes.append(f"squared distance on shared noise: {plus_minus(self.distance)} per row")
        if self.costs:
            notes.append("; ".join(f"{name}: {cost}" for name, cost in self.costs.items()))
        names = {
            reason: [_TITLES.get(n, n) for n, why in self.reasons.items() if why == reason]
            for reason in self.reasons.values()
        }
        return [*notes, *[f"{', '.join(lines)}: {reason}" for reason, lines in names.items()]]

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values, for ``json.dump``."""
        return asdict(self) | {"interval": list(self.interval), "is_inconsistent": self.is_inconsistent}


_TITLES = {"local": "local bound", "lower": "lower bound"}
_INCONSISTENT = (
    "INCONSISTENT: the lower limit {} is above an upper limit, {}, at a level of {}: one of them does not hold. Are the rows "
    "of the plates independent, and does each program draw all of its noise at sample sites?"
)


def _upper_limit(bound: Estimate, confidence: float) -> float:
    """The one-sided limit of a mean over runs, by Student's t distribution; infinite for a single run."""
    if bound.num_samples < 2:
        return math.inf
    return bound.mean + _t_quantile(confidence, bound.num_samples - 1) * bound.standard_error


def _t_quantile(confidence: float, degrees: int) -> float:
    """The quantile of Student's t distribution, of a confidence above 1/2, by bisection of the angle atan(t / sqrt(degrees))."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < 2 * confidence - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _t_within(angle: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) tan(angle)): Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4."""
    is_odd, cosine = degrees % 2, math.cos(angle)
    term = total = (cosine if degrees > 1 else 0.0) if is_odd else 1.0
    for number in range(3 if is_odd else 2, degrees - 1, 2):
        term *= cosine**2 * (number - 1) / number
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
