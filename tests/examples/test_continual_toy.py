"""Two halves of Old Faithful: the smoke preset, and what must not be forgotten."""

import json

import pytest
import torch

from examples import continual_toy


def test_continual_toy(tmp_path, capsys):
    results = continual_toy.main(["--smoke", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert (tmp_path / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    assert len(written["runs"]) == 2
    for label in (*continual_toy.METHODS.values(), *continual_toy.FIGURES.values()):
        assert label in printed


def test_distillation_forgets_less_than_fine_tuning():
    settings = continual_toy.Settings(steps=200, learning_rate=1e-2, likelihood_samples=2000)
    figures = continual_toy.run_seed(0, settings)[0]["models"]
    assert figures["continual"]["old"] > figures["fine-tuned"]["old"] + 1
    assert figures["continual"]["new"] > figures["first"]["new"] + 1


def test_the_likelihood_of_the_toy_is_exact_where_z_does_not_matter():
    vae = continual_toy.ToyVAE(continual_toy.Settings())
    for parameter in vae.decoder.parameters():
        torch.nn.init.zeros_(parameter)
    y = torch.randn(5, 2)
    exact = torch.distributions.Normal(0.0, vae.scale).log_prob(y).sum(-1).mean().item()
    assert continual_toy.log_likelihood(vae, 1, y, 10) == pytest.approx(exact, rel=1e-5)
