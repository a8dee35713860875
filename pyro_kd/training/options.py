"""Options of a fit that belong together: how it is validated, and where it writes checkpoints. Each checks itself when it is made."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_kd.training.batches import require_batches

__all__ = ["Checkpoints", "Validation", "refuse_former_names"]


@dataclass(frozen=True, eq=False)
class Validation:
    """Measure a validation loss during a fit, keep the best parameters, and stop when they no longer improve.

    Args:
        source: a function without arguments that returns the validation loss, or batches to evaluate (a ``DataLoader``, a list).
            Batches are evaluated at the schedules' values of the fit's last step, so that all validation losses are comparable.
        every: number of steps between validations.
        patience: number of validations without improvement after which the fit stops; None never stops.
        min_delta: smallest decrease of the validation loss that counts as an improvement; also for the best parameters, which may
            then be worse by less than this.
        restore_best: end the fit with the parameters of its best validation.

    Raises:
        TypeError: ``source`` can be iterated only once, or is neither a function nor batches.
        ValueError: ``every`` or ``patience`` is below 1, or ``min_delta`` is negative or NaN.

    Example:
        Stop after 5 validations without improvement::

            distiller.fit(batches=loader, steps=10_000, validation=Validation(held_out, every=200, patience=5))
    """

    source: Callable[[], float] | Iterable[Any]
    every: int = 100
    patience: int | None = None
    min_delta: float = 0.0
    restore_best: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.source, Iterator):
            raise TypeError("the validation batches can be iterated only once: pass a list or a DataLoader, not a generator")
        if not callable(self.source):
            require_batches(self.source, "validation")
        if not callable(self.source) and not hasattr(self.source, "__iter__") and not hasattr(self.source, "__getitem__"):
            raise TypeError(f"validation must be a function that returns a loss, or batches, not {self.source!r:.60}")
        if self.every < 1:
            raise ValueError(f"Validation(every=...) must be at least 1, not {self.every}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(
                f"Validation(patience=...) must be at least 1, or None to never stop early, not {self.patience}"
            )
        if math.isnan(self.min_delta) or self.min_delta < 0:
            raise ValueError(f"Validation(min_delta=...) must be at least 0, not {self.min_delta}")

    @classmethod
    def of(cls, value: "Validation | Callable[[], float] | Iterable[Any]") -> "Validation":
        """The options, also for a bare function or bare batches."""
        return value if isinstance(value, cls) else cls(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Checkpoints:
    """Write checkpoints during a fit, from which a later fit resumes: ``fit(..., resume=True)``.

    Args:
        folder: the folder for the checkpoints of one run; it is made where it does not exist.
        every: number of steps between checkpoints. One more is written at the end.
        keep: how many checkpoints to keep.

    Raises:
        TypeError: ``folder`` is no path.
        ValueError: ``every`` or ``keep`` is below 1.

    Example:
        A checkpoint every 200 steps, the last 5 of which stay::

            distiller.fit(batches=loader, steps=10_000, checkpoints=Checkpoints("runs/student", every=200, keep=5), resume=True)
    """

    folder: str | Path
    every: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | os.PathLike):
            raise TypeError(f"checkpoints must be a folder, or Checkpoints(folder, ...), not {self.folder!r:.60}")
        if self.every < 1:
            raise ValueError(f"Checkpoints(every=...) must be at least 1, not {self.every}")
        if self.keep < 1:
            raise ValueError(f"Checkpoints(keep=...) must be at least 1, not {self.keep}")

    @classmethod
    def of(cls, value: "Checkpoints | str | Path") -> "Checkpoints":
        """The options, also for a bare path."""
        return value if isinstance(value, cls) else cls(value)  # type: ignore[arg-type]


_FORMER_NAMES = {
    "validate_every": "validation=Validation(..., every={value!r})",
    "patience": "validation=Validation(..., patience={value!r})",
    "min_delta": "validation=Validation(..., min_delta={value!r})",
    "restore_best": "validation=Validation(..., restore_best={value!r})",
    "checkpoint": "checkpoints={value!r}",
    "checkpoint_every": "checkpoints=Checkpoints(..., every={value!r})",
    "keep": "checkpoints=Checkpoints(..., keep={value!r})",
}


def refuse_former_names(kwargs: dict[str, Any]) -> None:
    """Raise TypeError where a keyword that would go to the programs is the name of an option that belongs elsewhere.

    Raises:
        TypeError: names the new place.
    """
    for name, place in _FORMER_NAMES.items():
        if name in kwargs:
            raise TypeError(
                f"fit(...) has no option {name!r}: write fit(..., {place.format(value=kwargs[name])}). To pass an argument of this "
                f"name to the programs, use batches of mappings: batches=[{{{name!r}: ...}}]."
            )
