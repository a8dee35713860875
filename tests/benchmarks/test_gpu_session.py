"""The session for a GPU runs through on a CPU, with tiny sizes, and writes what the pages are made from."""

import argparse
import json
import time

import pyro
import pytest
import torch

from tests.benchmarks import gpu
from tests.benchmarks.applications import APPLICATIONS
from tests.benchmarks.gpu import ORDER, VARIANTS, main, measure, measure_all
from tests.benchmarks.gpu_profile import main as profile
from tests.benchmarks.gpu_profile import report
from tests.benchmarks.gpu_session import steps_that_fit
from tests.benchmarks.step_time import block


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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_profile_has_a_line_for_each_variant(device, capsys):
    sizes = ["--application", "helmholtz", "--rows", "2", "--steps", "1"]
    profile([*sizes, "--device", device, "--variants", "by hand", "as it is"])
    lines = [line for line in capsys.readouterr().out.splitlines()[1:] if not line.startswith(" ")]
    assert [line.split(":")[0] for line in lines] == ["by hand", "as it is"]
    assert all(("; 0 kernels" in line) == (device == "cpu") for line in lines)


def test_the_kernels_that_take_most_come_first():
    said = report("by hand", 0.5, 0.004, {"small": (2, 1e-4), "large": (3, 2e-3), "none": (1, 0.0)}, largest=2)
    assert said.splitlines()[0] == "by hand: first 0.50 s, then 4.0 ms; 6 kernels, 2.1 ms"
    assert [line.split()[-1] for line in said.splitlines()[1:]] == ["large", "small"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_block_of_one_step_does_not_register_parameters_anew(count):
    """A captured step that finds Pyro's store empty runs the program: it would be measured as an eager one."""
    application = APPLICATIONS["helmholtz"](rows=2)
    loss, store = application.captured(backend=None), {}
    found = []

    def step():
        found.append(len(pyro.get_param_store()))
        loss()

    block(step, count, "cpu", store)
    block(step, count, "cpu", store)
    assert found[0] == 0
    assert all(number > 0 for number in found[1:])
    assert len(pyro.get_param_store()) == 0


def test_applications_share_the_time_that_is_left(monkeypatch):
    """A compiler that takes long in one application does not leave the next without a figure."""
    deadlines = []

    def slow(name, sizes, device, *, deadline, **options):
        deadlines.append(deadline - time.perf_counter())
        time.sleep(0.2)
        return "", []

    monkeypatch.setattr(gpu, "measure", slow)
    options = argparse.Namespace(
        applications=["helmholtz", "chain"], device="cpu", variants=[], rows=2, length=None, all=True
    )
    measure_all(options, 0.1, time.perf_counter() + 2.0)
    assert deadlines == pytest.approx([1.0, 1.8], abs=0.1)
