"""The session for a GPU runs through on a CPU, with tiny sizes, and writes what the pages are made from."""

import json

import pytest
import torch

from tests.benchmarks.applications import APPLICATIONS
from tests.benchmarks.gpu import ORDER, VARIANTS, main, measure
from tests.benchmarks.gpu_session import steps_that_fit


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_session_writes_every_file(tmp_path, capsys):
    main(["--all", "--device", "cpu", "--smoke", "--out", str(tmp_path), "--variants", "by hand", "library", "as it is"])
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert set(steps["applications"]) == set(APPLICATIONS)
    for application in steps["applications"].values():
        assert [row["variant"] for row in application["variants"]] == ["by hand", "library", "as it is"]
        assert not any(row["error"] for row in application["variants"])
    assert "by hand" in (tmp_path / "steps.txt").read_text()
    assert set(json.loads((tmp_path / "session.json").read_text())["seconds"]) == {"step times", "hierarchical VAE"}
    results = json.loads((tmp_path / "hierarchical_vae/results.json").read_text())
    (run,) = results["runs"]
    assert len(run["models"]) == 4


def test_as_many_steps_are_taken_as_fit():
    found = {"applications": {"hierarchical_vae": {"variants": [{"variant": "library", "seconds": [0.02, 0.01, 0.03]}]}}}
    assert steps_that_fit(found, 400.0) == 3500
    assert steps_that_fit(found, 1e9) == 19_500
    assert steps_that_fit(found, 0.0) == 4
    assert steps_that_fit({"applications": {}}, 100.0) == 4


def test_the_order_has_every_application():
    assert sorted(ORDER) == sorted(APPLICATIONS)


def test_what_is_late_is_left_out():
    variants = {label: VARIANTS[label] for label in ("by hand", "library")}
    _, rows = measure("helmholtz", {"rows": 2}, "cpu", seconds=0.1, variants=variants, deadline=0.0)
    assert [row.error for row in rows] == ["left out: the time of the session was over"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    main(["--all"])
    assert capsys.readouterr().out.splitlines() == [
        "no CUDA device here: nothing was measured (--device cpu --smoke tries out the script)"
    ]
