"""The Helmholtz machine: the smoke preset, and dead units."""

import json

import pytest
import torch

from examples import helmholtz
from models.helmholtz import HelmholtzMachine


def test_helmholtz(tmp_path, capsys):
    results = helmholtz.main(["--smoke", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert (tmp_path / "densities.png").read_bytes().startswith(b"\x89PNG")
    assert len(written["runs"]) == 2
    for label in (*helmholtz.LABELS.values(), *helmholtz.FIGURES.values(), "died"):
        assert label in printed
    students = [run["models"][name] for run in written["runs"] for name in ("scratch", "local", "ours")]
    for student in students:
        assert student["parameters"] == 54
        assert student["surrogate_bound"] >= student["kl"] - 5 * student["kl_standard_error"]
        assert student["local_bound"] >= student["kl"] - 5 * student["kl_standard_error"]
    assert written["runs"][0]["models"]["teacher"]["parameters"] == 186
    spread = written["summary"]["ours"]["log_likelihood"]
    values = torch.tensor([run["models"]["ours"]["log_likelihood"] for run in written["runs"]], dtype=torch.float64)
    assert spread["standard_error"] == pytest.approx(float(values.std() / 2**0.5))


def test_dead_perceptrons_are_found_and_shown():
    torch.manual_seed(0)
    machine = HelmholtzMachine(16)
    assert helmholtz.dead_perceptrons(machine) == []
    torch.nn.init.constant_(machine.generative["z2"][0].bias, -100.0)
    assert helmholtz.dead_perceptrons(machine) == ["z2"]
    empty = {"dead": [], "parameters": 1, "log_likelihood": 0.0}
    runs = [
        {
            "seed": 5,
            "dead_at_initialisation": ["z2"],
            "models": dict.fromkeys(helmholtz.LABELS, empty) | {"ours": empty | {"dead": ["z2"]}},
        }
    ]
    table = helmholtz.format_table(helmholtz.summarise(runs * 2), runs * 2)
    assert "seed 5, ours: no active hidden unit left in z2" in table
    assert "2 of 2" in table
