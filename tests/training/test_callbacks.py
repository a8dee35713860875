"""Callbacks: order of calls, CSV, TensorBoard and the progress bar."""

import csv

import pyro
import pytest

from pyro_kd import Distiller
from pyro_kd.training import (
    Callback,
    Checkpoints,
    CSVLogger,
    TensorBoardLogger,
    Validation,
)
from pyro_kd.training.checkpoints import CheckpointFolder
from tests.support.losses import SurrogateKD
from tests.support.training_callbacks import Recorder
from tests.support.training_programs import adam, fast_sgd, fit, gaussian, mean, quiet_fit


def test_callbacks_are_called_in_order(tmp_path):
    recorder = Recorder()
    quiet_fit(
        Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"])),
        steps=3,
        callbacks=[recorder],
        checkpoints=Checkpoints(tmp_path, every=2),
    )
    assert recorder.calls == [
        ("start", 0, 3), ("step", 1), ("step", 2), ("checkpoint", "step-00000002"), ("step", 3), ("checkpoint", "step-00000003"), ("end", 3),
    ]  # fmt: skip


def test_a_resumed_fit_continues_its_csv_file(tmp_path):
    def rows():
        with (tmp_path / "log.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    distiller = Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]))
    options = {"callbacks": [CSVLogger(tmp_path / "log.csv")], "checkpoints": tmp_path / "run"}
    quiet_fit(distiller, steps=3, **options)
    assert [row["step"] for row in rows()] == ["1.0", "2.0", "3.0"]
    assert float(rows()[1]["loss"]) == distiller.history["loss"][1]
    assert rows()[1]["term/x"] == ""
    pyro.clear_param_store()
    again = Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]))
    quiet_fit(again, steps=5, resume=True, validation=Validation(lambda: 1.0, every=1), **options)
    assert [row["step"] for row in rows()] == ["1.0", "2.0", "3.0", "4.0", "5.0"]
    assert [row["validation/loss"] for row in rows()] == ["", "", "", "1.0", "1.0"]


def test_tensorboard_gets_every_loss(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    distiller = Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]))
    quiet_fit(distiller, steps=3, callbacks=[TensorBoardLogger(tmp_path)])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (i + 1, pytest.approx(v)) for i, v in enumerate(distiller.history["loss"])
    ]


def test_the_progress_bar_shows_label_steps_loss_and_terms(capsys):
    distiller = Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]), log_every=1)
    distiller.fit(steps=5, progress="student")
    shown = capsys.readouterr().err
    assert "student" in shown
    assert "5/5" in shown
    assert "loss=" in shown
    assert "x=" in shown


def test_a_csv_logger_writes_csv_whatever_the_file_is_called(tmp_path):
    fit(steps=2, callbacks=[CSVLogger(tmp_path / "logs" / "run.txt")])
    assert (tmp_path / "logs" / "run.txt").read_text().startswith("step,loss")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["run.txt"]


def test_a_callback_may_read_what_was_written(tmp_path):
    class Reader(Callback):
        steps = []

        def on_checkpoint(self, trainer, path):
            self.steps.append(CheckpointFolder.read(path).step)

    fit(tmp_path, student=mean, optim=adam, callbacks=[Reader()])
    assert Reader.steps == [2, 4]
