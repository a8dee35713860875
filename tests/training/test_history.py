"""The history of a fit, and its files."""

import math
import os

import pytest

from pyro_kd import Distiller, errors
from pyro_kd.training import (
    History,
)
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
