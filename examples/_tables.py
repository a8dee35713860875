"""The tables of the experiments: estimates over seeds, and how they are written as text. Knows no experiment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyro_kd.metrics import Estimate

__all__ = ["Estimates", "Run", "Table", "cell", "estimates", "over_seeds", "text_table"]

Estimates = list[Estimate | str]
"""A row of a table."""
Run = dict[str, Any]
"""What is kept of one seed, as JSON: by default ``{"models": {name: {figure: number}}}``."""


@dataclass(frozen=True)
class Table:
    """Figures with one row per model and one column per measure; a cell is text or an estimate over seeds.

    Attributes:
        title: what the figures are, with their unit.
        columns: names of the measures.
        rows: the cells of each model, by the model's name.
        note: a sentence that stands under the table and says what the names of its rows mean.
    """

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Estimates]
    note: str = ""

    @property
    def cells(self) -> list[list[str]]:
        """The head and the rows as text."""
        return [["", *self.columns]] + [[name, *map(cell, row)] for name, row in self.rows.items()]


def estimates(runs: Sequence[Run], figures: Sequence[str]) -> dict[str, Estimates]:
    """For each model of the runs, the mean and standard error over seeds of each figure; NaN where a run lacks it."""
    return {
        name: [over_seeds([run["models"].get(name, {}).get(figure, float("nan")) for run in runs]) for figure in figures]
        for name in runs[0]["models"]
    }


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean and standard error of one figure; the error of a single seed is NaN."""
    return Estimate.of(torch.tensor(values, dtype=torch.float64))


def cell(value: Estimate | str) -> str:
    """A figure as text, to two digits of its standard error."""
    if isinstance(value, str):
        return value
    mean, error = value.mean, value.standard_error
    if mean != mean:
        return "-"
    size = abs(mean) if error != error or error == 0 else error
    if abs(mean) >= 1e6:
        return f"{mean:.1e}" if error != error else f"{mean:.1e} ± {error:.1e}"
    digits = 3 if size == 0 else min(max(1 - int(torch.tensor(size).log10().floor()), 0), 6)
    return f"{mean:.{digits}f}" if error != error else f"{mean:.{digits}f} ± {error:.{digits}f}"


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, the first to the left; the first row is the head, underlined."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.rjust(width) if i else text.ljust(width) for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
