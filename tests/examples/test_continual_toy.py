"""Two halves of Old Faithful: the smoke preset, and what must not be forgotten."""

import json

import pyro
import pytest
import torch

from examples import continual_toy
from examples._experiment import Place


def test_the_smoke_preset_runs_and_is_written(tmp_path, capsys):
    results = continual_toy.main(["--preset", "smoke", "--seeds", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert (tmp_path / "forgetting-0.png").read_bytes().startswith(b"\x89PNG")
    assert len(written["runs"]) == 2
    for label in (*continual_toy.METHODS, *continual_toy.FIGURES.values()):
        assert label in printed


def test_distillation_forgets_less_than_fine_tuning(tmp_path):
    settings = continual_toy.ToySettings(steps=200, learning_rate=1e-2, likelihood_samples=2000)
    pyro.set_rng_seed(0)
    place = Place(tmp_path, tmp_path)
    figures = continual_toy.run_seed(0, settings, place)["models"]
    assert figures["surrogate (ours)"]["old"] > figures["fine-tuned"]["old"] + 1
    assert figures["surrogate (ours)"]["new"] > figures["after the first task"]["new"] + 1


def test_the_likelihood_of_the_toy_is_exact_where_z_does_not_matter():
    vae = continual_toy.ToyVAE(continual_toy.ToySettings())
    for parameter in vae.decoder.parameters():
        torch.nn.init.zeros_(parameter)
    y = torch.randn(5, 2)
    exact = torch.distributions.Normal(0.0, vae.scale).log_prob(y).sum(-1).mean().item()
    assert continual_toy.log_likelihood(vae, 1, y, 10) == pytest.approx(exact, rel=1e-5)
