"""Callbacks that hand the history of a fit to an experiment tracker, with figures: TensorBoard, MLflow, Weights & Biases, PNG files.

A tracker is a callback, given to ``fit`` itself. :class:`FigureLogger` draws, and hands its figures to a folder and to trackers.
"""

import math
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch

from pyro_kd.training.callbacks import Callback, Run
from pyro_kd.utils.randomness import keeping_random_state

__all__ = ["FigureLogger", "FigureSink", "MLflowLogger", "TensorBoardLogger", "WandbLogger"]


class FigureSink(Callback):
    """A callback that also takes figures."""

    @abstractmethod
    def write_figure(self, name: str, figure: Any, step: int) -> None:
        """Write a matplotlib figure under a name and a step. The figure may be closed."""


class FigureLogger(Callback):
    """Draws a figure at each validation or every few steps, such as samples of student and teacher on the same noise.

    ``draw`` runs without gradients and after a seed of its own, and the random generators end as they were: a fit with figures trains
    the same student as one without, and figures of different steps show the same noise.

    Args:
        draw: ``draw()`` returns a matplotlib figure, or axes, whose figure is taken.
        folder: for files ``NAME-STEP.png``, or None.
        sinks: trackers that get the figure; give them to ``fit`` as well, before this one.
        name: of the figure.
        every: steps between figures; None draws at each validation. There is always one after the last step.
        seed: of the noise in ``draw``.

    Raises:
        ValueError: ``every`` is below 1, or there is neither a folder nor a sink.

    Example:
        ::

            def draw():
                pair = to_inference_data(loss, student, teacher, 16, num_samples=1)
                return plots.paired_images(pair, "x")

            board = TensorBoardLogger("runs/board")
            figures = FigureLogger(draw, folder="runs/samples", sinks=[board])
            distiller.fit(64, steps=5000, validation=Validation(64, every=500), callbacks=[board, figures])
    """

    def __init__(
        self,
        draw: Callable[[], Any],
        *,
        folder: str | Path | None = None,
        sinks: Sequence[FigureSink] = (),
        name: str = "samples",
        every: int | None = None,
        seed: int = 0,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 step, or None for each validation, not {every}")
        if folder is None and not sinks:
            raise ValueError("a FigureLogger needs a folder for its figures, or sinks such as a TensorBoardLogger")
        self.draw, self.name, self.every, self.seed = draw, name, every, seed
        self.folder = None if folder is None else Path(folder)
        self.sinks = list(sinks)
        self._last = -1

    def on_start(self, trainer: Run, steps: int | None) -> None:
        """Nothing has been drawn."""
        self._last = -1

    def on_step(self, trainer: Run, row: Mapping[str, float]) -> None:
        """Draw, if it is time."""
        step = int(row["step"])
        validates = not math.isnan(row.get("validation/loss", math.nan))
        if validates if self.every is None else step % self.every == 0:
            self._write(step)

    def on_end(self, trainer: Run) -> None:
        """Draw the last step, if it has not been drawn and the fit has trained."""
        if trainer.num_steps > 0 and trainer.num_steps != self._last and math.isfinite(trainer.history.losses[-1]):
            self._write(trainer.num_steps)

    def _write(self, step: int) -> None:
        from matplotlib import pyplot

        with keeping_random_state(), torch.no_grad():
            pyro.set_rng_seed(self.seed)
            drawn = self.draw()
        figure = getattr(drawn, "figure", drawn)
        if not hasattr(figure, "savefig"):
            raise TypeError(f"draw() of a FigureLogger must return a matplotlib figure or axes, not {type(drawn).__name__}")
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.folder / f"{self.name}-{step:08d}.png", dpi=110)
        for sink in self.sinks:
            sink.write_figure(self.name, figure, step)
        pyplot.close(figure)
        self._last = step


class TensorBoardLogger(FigureSink):
    """Writes every number of the history as a TensorBoard scalar, and figures of a :class:`~pyro_kd.training.FigureLogger`.

    Args:
        folder: for the event files.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("TensorBoardLogger needs tensorboard: pip install tensorboard") from error
        self._make: Any = SummaryWriter
        self.folder = Path(folder)
        self._writer: Any = None

    def on_start(self, trainer: Run, steps: int | None) -> None:
        """Open the event file; events of a resumed fit replace older ones from its first step on."""
        self._writer = self._make(str(self.folder), purge_step=trainer.num_steps + 1)

    def on_step(self, trainer: Run, row: Mapping[str, float]) -> None:
        """Write a row."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def write_figure(self, name: str, figure: Any, step: int) -> None:
        """Write a matplotlib figure, and close it."""
        self._writer.add_figure(name, figure, step)

    def on_end(self, trainer: Run) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class MLflowLogger(FigureSink):
    """Writes every number of the history as a metric of an MLflow run, and figures as its artifacts.

    The run is open while the fit lasts. It is this logger's own: MLflow's active run does not change.

    Args:
        experiment: name of the experiment; it is made if there is none.
        tracking_uri: of the server, or ``sqlite:///FILE`` for a file, which needs the whole of mlflow; None is MLflow's own setting.
        run_id: continue this run, such as ``logger.run_id`` of an interrupted fit; None begins a new one.
        params: what else the run is to show, such as widths and learning rates.

    Attributes:
        run_id: of the run, once the fit has begun.

    Raises:
        ModuleNotFoundError: mlflow is not installed.
    """

    def __init__(
        self,
        experiment: str,
        *,
        tracking_uri: str | None = None,
        run_id: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            from mlflow import MlflowClient
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("MLflowLogger needs mlflow: pip install mlflow-skinny") from error
        self._client: Any = MlflowClient(tracking_uri)
        self.experiment, self.run_id, self.params = experiment, run_id, dict(params or {})

    def on_start(self, trainer: Run, steps: int | None) -> None:
        """Begin or continue the run."""
        if self.run_id is None:
            found = self._client.get_experiment_by_name(self.experiment)
            number = found.experiment_id if found else self._client.create_experiment(self.experiment)
            self.run_id = self._client.create_run(number).info.run_id
            for name, value in self.params.items():
                self._client.log_param(self.run_id, name, value)
        else:
            self._client.update_run(self.run_id, status="RUNNING")

    def on_step(self, trainer: Run, row: Mapping[str, float]) -> None:
        """Write a row."""
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), int(row["step"])
        metrics = [Metric(_plain(name), float(value), now, step) for name, value in row.items() if name != "step"]
        self._client.log_batch(self.run_id, metrics=metrics)

    def write_figure(self, name: str, figure: Any, step: int) -> None:
        """Write a matplotlib figure as a PNG artifact."""
        self._client.log_figure(self.run_id, figure, f"{name}/{step:08d}.png")

    def on_end(self, trainer: Run) -> None:
        """Close the run."""
        if self.run_id is not None:
            self._client.set_terminated(self.run_id)


class WandbLogger(FigureSink):
    """Writes every number of the history, and figures, to a run of Weights & Biases.

    Args:
        **options: of ``wandb.init``, such as ``project="kd"``, ``mode="offline"``, ``dir="runs"`` or ``config={...}``. A resumed fit
            continues its run with ``id=...`` and ``resume="allow"``.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """

    def __init__(self, **options: Any) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("WandbLogger needs wandb: pip install wandb") from error
        self._wandb: Any = wandb
        self.options = options
        self._run: Any = None

    def on_start(self, trainer: Run, steps: int | None) -> None:
        """Begin the run."""
        self._run = self._wandb.init(**self.options)

    def on_step(self, trainer: Run, row: Mapping[str, float]) -> None:
        """Write a row."""
        self._run.log({name: float(value) for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def write_figure(self, name: str, figure: Any, step: int) -> None:
        """Write a matplotlib figure as an image."""
        self._run.log({name: self._wandb.Image(figure)}, step=step)

    def on_end(self, trainer: Run) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish()


def _plain(name: str) -> str:
    """A name with MLflow's characters alone."""
    return re.sub(r"[^\w\-./ ]", "_", name)
