"""What happens during a fit besides training: a small protocol, and callbacks for CSV and a progress bar."""

import csv
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from pyro_kd.capture.stages import listening
from pyro_kd.training.files import write_text
from pyro_kd.training.history import History

__all__ = ["CSVLogger", "Callback", "ProgressBar", "Run"]


class Run(Protocol):
    """What a callback needs of the :class:`~pyro_kd.training.Trainer` that it is given."""

    @property
    def num_steps(self) -> int:
        """Optimisation steps done."""

    @property
    def history(self) -> History:
        """What was measured at each step."""

    def stop(self) -> None:
        """End the fit after its current step."""


class Callback:
    """Called by a fit. Each method does nothing unless a subclass overrides it.

    A row is what was measured in a step: see :class:`~pyro_kd.training.History` for its names. ``trainer.stop()`` ends the fit.

    Attributes:
        in_every_process: where several processes train together, whether all of them call it, as one needs that changes what is
            trained. Otherwise the first one does.
    """

    in_every_process: bool = False

    def on_start(self, trainer: Run, steps: int | None) -> None:
        """Before the first step; ``trainer.history`` holds the steps of a resumed fit. ``steps`` is the number at the end."""

    def on_step(self, trainer: Run, row: Mapping[str, float]) -> None:
        """After each optimisation step and its validation, before a checkpoint of it is written.

        What it changes in the student is in the checkpoint, and in the best student if the validation was the best.
        """

    def on_checkpoint(self, trainer: Run, path: Path) -> None:
        """After a checkpoint was written."""

    def on_end(self, trainer: Run) -> None:
        """After the last step, also if the fit was interrupted or raised an error; the last callback first.

        Where the best student of a validation is restored, it is in place.
        """


class CSVLogger(Callback):
    """Writes the history to a CSV file, row by row; a resumed fit continues the file.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._columns: list[str] = []

    def on_start(self, trainer: Run, steps: int | None) -> None:
        """Write what the history holds so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite(trainer)

    def on_step(self, trainer: Run, row: Mapping[str, float]) -> None:
        """Append a row, or rewrite the file if the row has a new column."""
        if not set(row) <= set(self._columns):
            self._rewrite(trainer)
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(repr(float(row[name])) if name in row else "" for name in self._columns)

    def _rewrite(self, trainer: Run) -> None:
        self._columns = list(trainer.history)
        write_text(self.path, trainer.history.to_csv(), "the history")


class ProgressBar(Callback):
    """A tqdm bar, in a terminal or a notebook, with the loss, its largest terms and the time left.

    While a step is captured, it says what that is doing, every few seconds.

    Args:
        label: text in front of the bar.
        terms: number of terms to show.
    """

    def __init__(self, label: str = "", terms: int = 3) -> None:
        self.label = label
        self.terms = terms
        self._bar: Any = None
        self._listening = ExitStack()

    def on_start(self, trainer: Run, steps: int | None) -> None:
        """Show the bar."""
        from tqdm.auto import tqdm

        self._bar = tqdm(total=steps, initial=trainer.num_steps, desc=self.label or None, mininterval=0.5)
        self._listening.enter_context(listening(self._show_stage))

    def on_step(self, trainer: Run, row: Mapping[str, float]) -> None:
        """Advance the bar, and show new terms if there are some."""
        terms = {name.removeprefix("term/"): value for name, value in row.items() if name.startswith("term/")}
        if terms or "validation/loss" in row or int(row["step"]) % 20 == 1:
            largest = sorted(terms, key=lambda name: -abs(terms[name]))[: self.terms]
            shown = {"loss": row["loss"]} | {name: terms[name] for name in largest}
            if "validation/loss" in row:
                shown["validation"] = row["validation/loss"]
            self._bar.set_postfix(
                {name: f"{value:.4g}" for name, value in shown.items() if not math.isnan(value)}, refresh=False
            )
        self._bar.update()

    def on_end(self, trainer: Run) -> None:
        """Close the bar."""
        self._listening.close()
        if self._bar is not None:
            self._bar.close()

    def _show_stage(self, text: str) -> None:
        self._bar.set_postfix_str(text)
