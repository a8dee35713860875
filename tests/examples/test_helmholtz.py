"""The Helmholtz machine's experiment: the smoke preset, and dead perceptrons."""

import json

import torch

from examples import helmholtz
from models.helmholtz import HelmholtzMachine


def test_the_smoke_preset_runs_and_its_bounds_hold(tmp_path, capsys):
    results = helmholtz.main(["--preset", "smoke", "--seeds", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    for seed in (0, 1):
        assert (tmp_path / f"densities-{seed}.png").read_bytes().startswith(b"\x89PNG")
    assert len(written["runs"]) == 2
    for label in (
        "teacher",
        "scratch",
        "local",
        "surrogate (ours)",
        "K samples (ours)",
        "exact marginal (ours)",
        *helmholtz.FIGURES.values(),
        "died",
    ):
        assert label in printed
    students = [run["models"][name] for run in written["runs"] for name in run["models"] if name != "teacher"]
    for student in students:
        assert student["parameters"] == 54
        assert student["surrogate_bound"] >= student["kl"] - 5 * student["kl_standard_error"]
        assert student["local_bound"] >= student["kl"] - 5 * student["kl_standard_error"]
    assert written["runs"][0]["models"]["teacher"]["parameters"] == 186


def test_dead_perceptrons_are_found_and_shown():
    torch.manual_seed(0)
    machine = HelmholtzMachine(16)
    assert helmholtz.dead_perceptrons(machine) == []
    torch.nn.init.constant_(machine.generative["z2"][0].bias, -100.0)
    assert helmholtz.dead_perceptrons(machine) == ["z2"]
    empty = {"dead": [], "parameters": 54}
    models = dict.fromkeys(("teacher", "scratch", "local"), empty) | {"surrogate (ours)": empty | {"dead": ["z2"]}}
    tables = helmholtz.tables([{"seed": 5, "models": models}] * 2)
    assert tables["dead"].rows == {"seed 5, surrogate (ours)": ["z2"]}
    assert tables["figures"].rows["surrogate (ours)"][-1] == "2 of 2"
    assert tables["figures"].rows["local"][-1] == "0 of 2"
