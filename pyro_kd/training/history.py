"""What was measured in each step: a table that can be plotted, saved and continued. Knows numbers by name, and no training."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pyro_kd.errors import CheckpointError
from pyro_kd.training.files import write_text
from pyro_kd.utils.display import as_html

__all__ = ["History"]


class History(Mapping[str, list[float]]):
    """Columns of numbers, with one row per optimisation step.

    Always present: ``step``, counted from 1, ``loss``, and ``seconds`` for the step. Where they were measured:
    ``lr``; ``loss/NAME`` for each of several objectives; ``term/SITE``, the weighted term of a site; ``validation/loss``.
    A value that was not measured in a step is NaN.

    Example:
        >>> from pyro_kd.training import History
        >>> history = History()
        >>> history.append({"step": 1, "loss": 2.0}); history.append({"step": 2, "loss": 1.0, "term/z": 0.5})
        >>> history.losses, history["term/z"]
        ([2.0, 1.0], [nan, 0.5])
    """

    def __init__(self) -> None:
        self._columns: dict[str, list[float]] = {}
        self._rows = 0

    def __getitem__(self, column: str) -> list[float]:
        return self._columns[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        last = [f"{name}={column[-1]:.4g}" for name, column in self.items() if column and not math.isnan(column[-1])]
        return f"History({self._rows} steps{': ' + ', '.join(last) if last else ''})"

    def _repr_html_(self) -> str:
        rows = dict[str, str]()
        for name, column in self.items():
            known = [value for value in column if not math.isnan(value)]
            if known and name != "step":
                rows[name] = f"{known[0]:.4g} at first, {known[-1]:.4g} at last; {min(known):.4g} to {max(known):.4g}"
                rows[name] += "" if len(known) == self._rows else f"; measured at {len(known)} steps"
        return as_html(f"History of {self._rows} steps", rows)

    @classmethod
    def from_columns(cls, columns: Mapping[str, list[float]]) -> "History":
        """A history with given columns.

        Raises:
            ValueError: the columns differ in length.
        """
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns of a history have equal lengths, and these have {lengths}")
        history = cls()
        history._columns = {name: list(column) for name, column in columns.items()}
        history._rows = max(lengths.values(), default=0)
        return history

    @property
    def losses(self) -> list[float]:
        """The column ``loss``: the loss before each step."""
        return self._columns.get("loss", [])

    @property
    def num_rows(self) -> int:
        """Number of steps."""
        return self._rows

    def append(self, row: Mapping[str, float]) -> None:
        """Add a step."""
        for name in row:
            if name not in self._columns:
                self._columns[name] = [math.nan] * self._rows
        for name, column in self._columns.items():
            column.append(float(row.get(name, math.nan)))
        self._rows += 1

    def set_last(self, row: Mapping[str, float]) -> None:
        """Add values to the last step."""
        for name, value in row.items():
            self._columns.setdefault(name, [math.nan] * self._rows)[-1] = float(value)

    def row(self, index: int) -> dict[str, float]:
        """What was measured in a step, by its index (negative: from the end)."""
        values = {name: column[index] for name, column in self.items()}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def to_json(self) -> str:
        """As JSON; NaN is null."""
        return json.dumps(
            {name: [None if math.isnan(value) else value for value in column] for name, column in self.items()}
        )

    @classmethod
    def from_json(cls, text: str) -> "History":
        """Read what :meth:`to_json` has written.

        Raises:
            ValueError: the text is no history.
        """
        columns = json.loads(text)
        if not isinstance(columns, dict) or not all(isinstance(column, list) for column in columns.values()):
            raise ValueError("a history is an object of lists by name")
        return cls.from_columns({name: [_number(value) for value in column] for name, column in columns.items()})

    def to_csv(self) -> str:
        """As CSV with a line of names; NaN is empty."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(self)
        writer.writerows(["" if math.isnan(v) else repr(v) for v in row] for row in zip(*self.values(), strict=True))
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> "History":
        """Read what :meth:`to_csv` has written.

        Raises:
            ValueError: the text is no history, or only a part of one.
        """
        if not text.endswith("\n"):
            raise ValueError("its last line is cut short")
        header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        if len(set(header)) < len(header):
            raise ValueError("two columns have the same name")
        if any(len(row) != len(header) for row in rows):
            raise ValueError("its lines differ in length")
        return cls.from_columns({name: [float(row[i] or math.nan) for row in rows] for i, name in enumerate(header)})

    def save(self, path: str | Path) -> None:
        """Write the table, as a whole or not at all: as CSV where the name ends in .csv, otherwise as JSON.

        Raises:
            CheckpointError: the file cannot be written.
        """
        write_text(path, self.to_csv() if Path(path).suffix == ".csv" else self.to_json(), "the history")

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """Read what :meth:`save` has written.

        Raises:
            CheckpointError: the file cannot be read, is cut short, or is no history.
        """
        try:
            text = Path(path).read_bytes().decode()
            return cls.from_csv(text) if Path(path).suffix == ".csv" else cls.from_json(text)
        except (OSError, ValueError, OverflowError, csv.Error, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as a history ({error})") from error


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r:.40} is no number")
    return float(value)
