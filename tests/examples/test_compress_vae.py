"""Compressing a VAE: the smoke preset, and what it must learn."""

import json

import pytest
import torch

from examples import compress_vae
from models.vae import VAE


def test_the_smoke_preset_runs_and_is_written(tmp_path, capsys):
    results = compress_vae.main(["--preset", "smoke", "--seeds", "2", "--out", str(tmp_path), "--cache", str(tmp_path)])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert (tmp_path / "digits-0.png").read_bytes().startswith(b"\x89PNG")
    assert len(written["runs"]) == 2
    for label in ("teacher", "scratch", "surrogate (ours)", *compress_vae.FIGURES.values(), "84544 + 86544", "2400 + 2608"):
        assert label in printed
    for run in written["runs"]:
        models = run["models"]
        assert (
            models["teacher"]["elbo"] > models["surrogate (ours)"]["elbo"] > -64 * 0.7
        )  # a fair coin for each pixel, and a little less
        assert models["surrogate (ours)"]["encoder_kl"] < models["scratch"]["encoder_kl"]


def test_compression_brings_both_programs_nearer_without_data():
    """The student comes nearer to its teacher in both programs, and the teacher stays as it was."""
    torch.manual_seed(0)
    settings = compress_vae.CompressSettings(steps=60, rows=64, latents=2, learning_rate=1e-2)
    teacher, student = VAE(64, 2, [16]), VAE(64, 2, [4])
    before = [parameter.clone() for parameter in teacher.parameters()]
    model, guide = compress_vae.freeze(teacher.model), compress_vae.freeze(teacher.guide)
    images = compress_vae.images_of(model, 500)

    def distances():
        generator = compress_vae.paper_loss(["x"]).loss(student.model, model, 500)
        return generator, compress_vae.paper_loss(["z"]).loss(student.guide, guide, 500, images)

    first = distances()
    compress_vae.compress(student, model, guide, settings, "test")
    assert all(after < 0.7 * start for after, start in zip(distances(), first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before, strict=True))


def test_the_elbo_of_an_exact_posterior_is_the_likelihood():
    """Zero weights: z and x are independent, so that the prior is the posterior and each pixel a fair coin."""
    vae = VAE(64, 2, [4])
    for parameter in vae.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.rand(10, 64).bernoulli()
    assert compress_vae.elbo_of(vae, x, 3) == pytest.approx(-64 * torch.tensor(2.0).log().item(), rel=1e-5)
