"""The history of a fit, and its files."""

import math
import os

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import Distiller, errors, freeze
from pyro_kd.training import History
from tests.support.losses import SurrogateKD
from tests.support.training_programs import fast_sgd, gaussian, mean, quiet_fit, snapshot


def test_the_history_holds_what_was_measured_and_survives_its_files(tmp_path):
    distiller = Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]), log_every=2)
    history = quiet_fit(distiller, steps=3)
    assert list(history) == ["step", "loss", "term/x", "lr", "seconds"]
    assert history["step"] == [1.0, 2.0, 3.0]
    assert history["term/x"][0] == history["loss"][0]
    assert math.isnan(history["term/x"][1])
    assert history.row(-1).keys() == {"step", "loss", "term/x", "lr", "seconds"}
    for name in ("history.json", "history.csv"):
        history.save(tmp_path / name)
        again = History.load(tmp_path / name)
        assert again.to_json() == history.to_json()
        assert again.num_rows == 3
    assert "3 steps" in repr(history)


def history():
    found = History()
    for step in range(1, 4):
        found.append({"step": step, "loss": 1 / step, **({"term/x": 0.5} if step == 2 else {})})
    return found


@pytest.mark.parametrize("name", ["history.json", "history.csv"])
def test_a_history_is_written_as_a_whole_or_not_at_all(tmp_path, name, monkeypatch):
    history().save(tmp_path / name)
    assert History.load(tmp_path / name).to_json() == history().to_json()
    History().save(tmp_path / f"empty-{name}")
    assert History.load(tmp_path / f"empty-{name}").num_rows == 0
    before = snapshot(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(errors.CheckpointError, match="the history could not be written"):
        History().save(tmp_path / name)
    assert snapshot(tmp_path) == before
    with pytest.raises(errors.CheckpointError, match="there is no folder"):
        history().save(tmp_path / "none" / name)


@pytest.mark.parametrize("name", ["history.json", "history.csv"])
def test_a_history_that_is_cut_short_is_an_error(tmp_path, name):
    history().save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for length in range(len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:length])
        try:
            found = History.load(tmp_path / name)
        except errors.CheckpointError:
            continue
        rows = found.num_rows
        assert name.endswith("csv"), length
        assert whole[:length].endswith(b"\n"), length
        assert found["loss"] == history()["loss"][:rows]
    with pytest.raises(errors.CheckpointError, match="cannot be read"):
        History.load(tmp_path / f"none-{name}")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "1",
        '{"step": 1}',
        '{"step": [1, "2"]}',
        '{"step": [1], "loss": [1, 2]}',
        '{"step": [true]}',
        "\xff",
        "[" * 10**5,
    ],
)
def test_json_that_is_no_history_is_an_error(tmp_path, text):
    (tmp_path / "history.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(errors.CheckpointError, match="cannot be read as a history"):
        History.load(tmp_path / "history.json")


@pytest.mark.parametrize("text", ["step,loss\r\n1\r\n", "step,step\r\n1,2\r\n", "step\r\nx\r\n", 'step\r\n"1\r\n'])
def test_csv_that_is_no_history_is_an_error(tmp_path, text):
    (tmp_path / "history.csv").write_bytes(text.encode())
    with pytest.raises(errors.CheckpointError, match="cannot be read as a history"):
        History.load(tmp_path / "history.csv")


def slow_sgd(params):
    return torch.optim.SGD(params, lr=1e-3)


def two_latents(loc):
    def model(rows):
        shift = pyro.param("shift", torch.tensor(0.5)) if loc is None else loc
        with pyro.plate("rows", rows):
            a = pyro.sample("a", dist.Normal(shift, 1.0))
            b = pyro.sample("b", dist.Normal(a + shift, 1.0))
            pyro.sample("x", dist.Normal(a * b + shift, 0.5))

    return model


LOGGED = {
    "a number": lambda: ({"teacher_forcing": 0.0}, {}),
    "by site": lambda: ({"teacher_forcing": 0.0, "latent_weight": {"a": 0.3, "b": 0.0}}, {}),
    "a function": lambda: ({"teacher_forcing": 0.0, "latent_weight": lambda name: 0.3 if name == "a" else 0.7}, {}),
    "a schedule": lambda: ({"teacher_forcing": 0.0}, {"latent_weight": lambda step: 0.1 * step}),
    "some given": lambda: ({"teacher_forcing": {"a": 0.5, "b": 1.0}, "given_weight": 0.6}, {}),
    "a schedule of what is given": lambda: ({"given_weight": 0.6}, {"teacher_forcing": lambda step: step / 10}),
    "local first": lambda: ({}, {"local_steps": 4}),
    "draws that serve several steps": lambda: ({"teacher_forcing": 0.0, "reuse": 2}, {}),
    "particles": lambda: ({"teacher_forcing": 0.0, "num_particles": 3}, {}),
}


@pytest.mark.parametrize("name", LOGGED)
def test_logged_terms_of_a_captured_loss_are_those_of_an_eager_one(name):
    rows = []
    for compile in (False, {"backend": None}):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        options, schedules = LOGGED[name]()
        loss = SurrogateKD(["x"], **options)
        distiller = Distiller(
            two_latents(None), freeze(two_latents(0.0)), slow_sgd, loss, log_every=1, compile=compile, **schedules
        )
        history = distiller.fit(6, steps=10, progress=False)
        rows.append({key: history[key] for key in history if key.startswith(("term/", "loss"))})
    eager, captured = rows
    assert captured == {key: pytest.approx(values, rel=1e-6, abs=1e-7, nan_ok=True) for key, values in eager.items()}
    assert any(key.startswith("term/") for key in eager)


def test_logged_steps_take_the_draws_of_the_pool_where_the_loss_is_captured():
    runs = []

    def teacher(rows):
        runs.append(rows)
        return two_latents(0.0)(rows)

    loss = SurrogateKD(["x"], teacher_forcing=0.0)
    distiller = Distiller(two_latents(None), teacher, slow_sgd, loss, log_every=1, compile={"backend": None}, reuse=2)
    distiller.fit(6, steps=8, progress=False)
    before = len(runs)
    distiller.fit(6, steps=20, progress=False)
    assert len(runs) == before + 1  # the check at the end of the fit
