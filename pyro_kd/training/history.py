"""What a fit has measured, step by step: a table that can be plotted, saved and continued."""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["History"]


class History(Mapping[str, list[float]]):
    """Columns of numbers, one row an optimisation step.

    ``step``, counted from 1, ``loss``, and ``seconds`` for the step are always there. Where they were measured:
    ``lr``; ``loss/NAME`` for each of several objectives; ``term/SITE``, the weighted term of a site; ``validation/loss``.
    A value that was not measured at a step is NaN.

    Example:
        >>> from pyro_kd.training import History
        >>> history = History()
        >>> history.append({"step": 1, "loss": 2.0}); history.append({"step": 2, "loss": 1.0, "term/z": 0.5})
        >>> history["loss"], history["term/z"]
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
        last = ", ".join(f"{name}={column[-1]:.4g}" for name, column in self.items() if not math.isnan(column[-1]))
        return f"History({self._rows} steps{': ' + last if last else ''})"

    @classmethod
    def from_columns(cls, columns: Mapping[str, list[float]]) -> "History":
        """A history of given columns, all of one length."""
        history = cls()
        history._columns = {name: list(column) for name, column in columns.items()}
        history._rows = max(map(len, history._columns.values()), default=0)
        return history

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
        """What was measured at a step, by its index (negative: from the end)."""
        values = {name: column[index] for name, column in self.items()}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def to_json(self) -> str:
        """As JSON; NaN is null."""
        return json.dumps(
            {name: [None if math.isnan(value) else value for value in column] for name, column in self.items()}
        )

    @classmethod
    def from_json(cls, text: str) -> "History":
        """Read what :meth:`to_json` has written."""
        columns = json.loads(text).items()
        return cls.from_columns(
            {name: [math.nan if value is None else value for value in column] for name, column in columns}
        )

    def save(self, path: str | Path) -> None:
        """Write the table: as CSV where the name ends in .csv, else as JSON."""
        path = Path(path)
        if path.suffix != ".csv":
            path.write_text(self.to_json(), encoding="utf-8")
            return
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self)
            writer.writerows(["" if math.isnan(v) else repr(v) for v in row] for row in zip(*self.values(), strict=True))

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """Read what :meth:`save` has written."""
        path = Path(path)
        if path.suffix != ".csv":
            return cls.from_json(path.read_text(encoding="utf-8"))
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        return cls.from_columns(
            {name: [float(row[i]) if row[i] else math.nan for row in rows[1:]] for i, name in enumerate(rows[0])}
        )
