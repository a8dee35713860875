"""Callbacks for experiment trackers and figures. MLflow and Weights & Biases run offline, where they are installed."""

import sys
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import Distiller, freeze, plots
from pyro_kd.diagnosis import to_inference_data
from pyro_kd.training import FigureLogger, MLflowLogger, TensorBoardLogger, Validation, WandbLogger
from tests.support.losses import SurrogateKD
from tests.support.training_programs import adam, fast_sgd, gaussian, mean, quiet_fit

pytest.importorskip("matplotlib")


def images(seed):
    torch.manual_seed(seed)
    net = torch.nn.Linear(2, 36)

    def model(rows=3):
        pyro.module("images", net)
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z).unflatten(-1, (1, 6, 6)), 0.1).to_event(3))

    return model


def figure():
    from matplotlib import pyplot

    made, ax = pyplot.subplots(figsize=(1, 1))
    ax.plot([0, torch.rand(()).item()])
    return made


def one(**options):
    pyro.clear_param_store()
    return Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]), **options)


def test_figures_are_drawn_at_validations_and_after_the_last_step(tmp_path):
    quiet_fit(one(), steps=5, validation=Validation([1], every=2), callbacks=[FigureLogger(figure, folder=tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "samples-00000002.png", "samples-00000004.png", "samples-00000005.png",
    ]  # fmt: skip


def test_figures_are_drawn_every_few_steps(tmp_path):
    quiet_fit(one(), steps=4, callbacks=[FigureLogger(figure, folder=tmp_path, every=2, name="rows")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows-00000002.png", "rows-00000004.png"]


def test_figures_change_nothing_and_show_the_same_noise(tmp_path):
    found, drawn = {}, []

    def noisy():
        drawn.append(float(torch.rand(())))
        return figure()

    for name, callbacks in {"plain": [], "figures": [FigureLogger(noisy, folder=tmp_path, every=1)]}.items():
        pyro.clear_param_store()
        student = images(1)
        distiller = Distiller(student, freeze(images(2)), adam, SurrogateKD(["x"]))
        quiet_fit(distiller, steps=4, callbacks=callbacks)
        found[name] = distiller.history["loss"]
    assert found["plain"] == found["figures"]
    assert len(drawn) == 4
    assert len(set(drawn)) == 1


def test_figures_of_samples_on_the_same_noise(tmp_path):
    pyro.clear_param_store()
    student, teacher, loss = images(1), freeze(images(2)), SurrogateKD(["x"])
    shown = []

    def draw():
        pair = to_inference_data(loss, student, teacher, 3, num_samples=1)
        shown.append(plots.paired_images(pair, "x", rows=2))
        return shown[-1]

    quiet_fit(Distiller(student, teacher, adam, loss), 3, steps=2, callbacks=[FigureLogger(draw, folder=tmp_path)])
    (picture,) = shown[-1].get_images()
    assert np.asarray(picture.get_array()).shape == (2 * 6 + 1, 2 * 6 + 1)
    assert (tmp_path / "samples-00000002.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_of_a_fit_that_fails_at_once(tmp_path):
    def broken(rows=1):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0))
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        quiet_fit(
            Distiller(broken, gaussian(3.0), fast_sgd, SurrogateKD(["x"])),
            steps=3,
            callbacks=[FigureLogger(figure, folder=tmp_path)],
        )
    assert not list(tmp_path.iterdir())


def test_wrong_options_of_figures(tmp_path):
    with pytest.raises(ValueError, match="every must be at least 1 step, or None for each validation, not 0"):
        FigureLogger(figure, folder=tmp_path, every=0)
    with pytest.raises(ValueError, match="needs a folder for its figures, or sinks"):
        FigureLogger(figure)
    with pytest.raises(TypeError, match="must return a matplotlib figure or axes, not int"):
        quiet_fit(one(), steps=1, callbacks=[FigureLogger(lambda: 3, folder=tmp_path)])


def test_tensorboard_gets_figures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoardLogger(tmp_path)
    quiet_fit(one(), steps=3, callbacks=[board, FigureLogger(figure, sinks=[board], every=2)])
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Images("samples")] == [2, 3]


def test_mlflow_gets_numbers_and_figures(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the light package has no database
    uri = (tmp_path / "runs").as_uri()
    distiller = one()
    logger = MLflowLogger("kd", tracking_uri=uri, params={"width": 4})
    quiet_fit(distiller, steps=3, callbacks=[logger, FigureLogger(figure, sinks=[logger], every=2)])
    client = mlflow.MlflowClient(uri)
    quiet_fit(distiller, steps=2, callbacks=[MLflowLogger("kd", tracking_uri=uri, run_id=logger.run_id)])
    metrics = client.get_metric_history(logger.run_id, "loss")
    assert [(metric.step, metric.value) for metric in metrics] == [
        (i + 1, pytest.approx(value)) for i, value in enumerate(distiller.history["loss"])
    ]
    run = client.get_run(logger.run_id)
    assert (run.data.params, run.info.status) == ({"width": "4"}, "FINISHED")
    drawn = [entry.path for entry in client.list_artifacts(logger.run_id, "samples")]
    assert drawn == ["samples/00000002.png", "samples/00000003.png"]
    assert mlflow.active_run() is None


def test_wandb_writes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(mode="offline", dir=str(tmp_path), project="kd")
    quiet_fit(one(), steps=3, callbacks=[logger, FigureLogger(figure, sinks=[logger], every=2)])
    assert len(list(tmp_path.rglob("samples*.png"))) == 2
    (file,) = tmp_path.rglob("*.wandb")
    assert file.stat().st_size > 0


def test_wandb_gets_numbers_and_figures(monkeypatch):
    """Of a run whose records are kept."""
    written, closed = [], []

    class Kept:
        def log(self, row, step):
            written.append((step, row))

        def finish(self):
            closed.append(len(written))

    stub = types.SimpleNamespace(init=lambda **options: Kept(), Image=lambda figure: "image")
    monkeypatch.setitem(sys.modules, "wandb", stub)
    logger, distiller = WandbLogger(project="kd"), one()
    quiet_fit(distiller, steps=3, callbacks=[logger, FigureLogger(figure, sinks=[logger], every=2)])
    assert [(step, row["loss"]) for step, row in written if "loss" in row] == list(enumerate(distiller.history["loss"], 1))
    assert [(step, row) for step, row in written if "samples" in row] == [
        (2, {"samples": "image"}),
        (3, {"samples": "image"}),
    ]
    assert closed == [len(written)]


@pytest.mark.parametrize(("logger", "module"), [(MLflowLogger, "mlflow"), (WandbLogger, "wandb")])
def test_a_missing_tracker_is_named(logger, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=f"{logger.__name__} needs {module}: pip install {module}"):
        logger("kd") if logger is MLflowLogger else logger(project="kd")
