"""Distilling posteriors: the measures, and the smoke preset."""

import json
import math

import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from examples import posterior_predictive as example
from models.bayesian_classifier import BayesianClassifier
from models.eight_schools import EightSchools


def test_a_prediction_is_the_mean_over_draws():
    model, x = BayesianClassifier(4, 3, 5), torch.rand(7, 4)
    samples = {name: torch.randn(20, *shape) for name, shape in model.shapes.items()}
    draws = [{name: value[i] for name, value in samples.items()} for i in range(20)]
    mean = torch.stack([model.logits(x, draw).softmax(-1) for draw in draws]).mean(0)
    torch.testing.assert_close(example.predictive(samples, x).exp(), mean)


def test_draws_of_a_guide_have_a_dimension_on_the_left():
    model = BayesianClassifier(4, 3, 5)
    guide, x = AutoNormal(model), torch.rand(7, 4)
    guide(x, torch.zeros(7, dtype=torch.long))
    found = example.draws_of_guide(guide, 6, x)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        name: (6, *shape) for name, shape in model.shapes.items()
    }


def test_replicated_data_have_the_law_of_the_model():
    model = EightSchools()
    samples = {"mu": torch.tensor([100.0]), "tau": torch.tensor([0.0]), "eta": torch.zeros(1, 8)}
    data = example.replicate(model, samples, 4000)
    error = data.std(0) / 4000**0.5
    assert ((data.mean(0) - 100).abs() < 5 * error).all()
    torch.testing.assert_close(data.std(0), model.errors, rtol=5 / (2 * 4000) ** 0.5, atol=0)  # five standard errors
    law = example.given(model, {name: value.unsqueeze(1) for name, value in samples.items()})
    assert law.log_prob(data).shape == (1, 4000)


def test_measures_by_hand():
    figures = example.measure_digits(
        torch.tensor([[0.9, 0.1], [0.6, 0.4]], dtype=torch.float64).log(), torch.tensor([0, 1]), 3
    )
    assert figures["accuracy"] == 50
    assert figures["log_likelihood"] == pytest.approx((math.log(0.9) + math.log(0.4)) / 2)
    assert figures["calibration_error"] == pytest.approx(100 * (0.1 + 0.6) / 2)
    drawn = torch.linspace(0, 100, 101)[:, None].expand(101, 2)  # whose interval is from 5 to 95, for each and for the mean
    data = torch.tensor([[50.0, 96.0], [1.0, 10.0], [1.0, 2.0]])
    found = example.measure_schools(torch.tensor([-1.0, -3.0, -2.0]), drawn, data, 9)
    assert found == pytest.approx(
        {"log_likelihood": -2.0, "coverage": 100 / 3, "coverage_of_mean": 200 / 3, "evaluations": 9}
    )


def test_the_smoke_preset_runs(tmp_path, capsys):
    options = ["--preset", "smoke", "--cache", str(tmp_path / "cache")]
    results = example.main([*options, "--out", str(tmp_path / "one")])
    assert "trained before" not in capsys.readouterr().out
    assert json.loads((tmp_path / "one" / "results.json").read_text()) == json.loads(json.dumps(results))
    run = results["runs"][0]
    assert list(run["digits"]) == [
        "teacher, NUTS",
        "teacher, autoguide",
        *(f"surrogate (ours), {kind}" for kind in ("NUTS", "autoguide", "a mixture of both")),
        "scratch, with the prior",
        "scratch",
    ]
    assert len(run["schools"]) == 6
    for figures in (*run["digits"].values(), *run["schools"].values()):
        assert all(math.isfinite(value) for value in figures.values())
    again = example.main([*options, "--out", str(tmp_path / "two")])
    assert capsys.readouterr().out.count("trained before") == 2
    assert again["runs"][0]["digits"] == run["digits"]
