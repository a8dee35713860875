"""Distilling an information bottleneck: its measures, and the smoke preset."""

import json
import math

import pytest
import torch

from examples import information_bottleneck as example

SMALL = ["--preset", "smoke", "--teacher-steps", "8", "--steps", "4"]


def test_calibration_by_hand():
    """Four images with confidences 0.9, 0.9, 0.6 and 0.6; right are one of the first pair and both of the second."""
    probs = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]], dtype=torch.float64)
    table = example.calibration(probs.log(), torch.tensor([0, 0, 0, 1]), bins=4)
    assert [row[0] for row in table] == [0, 0, 2, 2]
    assert table[2][1:] == pytest.approx((0.6, 1.0))
    assert table[3][1:] == pytest.approx((0.9, 0.5))
    assert example.calibration_error(table) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)


def test_a_sure_and_right_classifier_is_calibrated():
    log_probs = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    assert example.calibration_error(example.calibration(log_probs, torch.tensor([0, 1]))) == 0


def test_measures_by_hand():
    teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.25, 0.75], [0.9, 0.1]], dtype=torch.float64).log()
    found = example.measure(student, torch.tensor([1, 1]), teacher)
    assert found["accuracy"] == 50
    assert found["agreement"] == 50
    assert found["nll"] == pytest.approx(-(math.log(0.75) + math.log(0.1)) / 2)
    assert found["kl"] == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)) / 2)
    assert example.measure(teacher, torch.tensor([1, 1]), teacher)["kl"] == 0


def test_the_smoke_preset_runs(tmp_path, capsys):
    options = ["--cache", str(tmp_path / "cache")]
    results = example.main([*SMALL, "--out", str(tmp_path / "one"), *options])
    printed = capsys.readouterr().out
    assert "trained before" not in printed
    assert json.loads((tmp_path / "one" / "results.json").read_text()) == json.loads(json.dumps(results))
    picture = (tmp_path / "one" / "reliability.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 300_000
    models = results["runs"][0]["models"]
    assert list(models) == ["teacher", "scratch", *example.LOSSES]
    assert models["teacher"]["agreement"] == 100
    assert models["teacher"]["kl"] == 0
    for figures in models.values():
        assert all(math.isfinite(value) for value in figures.values())

    again = example.main([*SMALL, "--out", str(tmp_path / "two"), *options])
    assert "trained before" in capsys.readouterr().out
    assert again["runs"][0]["models"] == models


def test_unknown_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="digits"):
        example.main([*SMALL, "--data", "letters", "--out", str(tmp_path)])
