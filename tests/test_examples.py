"""Every example runs in a few seconds with --smoke, and writes what it says."""

import json
from pathlib import Path

import pytest
import torch

from examples import compress_vae, continual_toy, helmholtz
from models.helmholtz import HelmholtzMachine
from models.vae import VAE

EXAMPLES = {path.stem for path in (Path(__file__).parents[1] / "examples").glob("[!_]*.py")}
SMOKE_TESTED = {"compress_vae", "continual_toy", "helmholtz"}


def test_every_example_has_a_smoke_test():
    assert EXAMPLES == SMOKE_TESTED


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


@pytest.mark.parametrize(("width", "expected"), [(8, 186), (2, 54)])
def test_helmholtz_has_the_papers_sizes(width, expected):
    assert sum(p.numel() for p in HelmholtzMachine(width).generative.parameters()) == expected


def test_compress_vae(tmp_path, capsys):
    results = compress_vae.main(["--smoke", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert len(written["runs"]) == 2
    for label in ("teacher", "scratch", "ours", *compress_vae.FIGURES.values(), "84544 + 86544", "2400 + 2608"):
        assert label in printed
    for run in written["runs"]:
        models = run["models"]
        assert (
            models["teacher"]["elbo"] > models["ours"]["elbo"] > -64 * 0.7
        )  # black or white by a fair coin, and a little more
        assert models["ours"]["encoder_kl"] < models["scratch"]["encoder_kl"]


def test_compression_needs_no_data():
    """A student that is compressed comes nearer to its teacher in both programs, and the teacher stays as it was."""
    torch.manual_seed(0)
    settings = compress_vae.Settings(steps=60, rows=64, latents=2, learning_rate=1e-2)
    teacher, student = VAE(64, 2, [16]), VAE(64, 2, [4])
    before = [parameter.clone() for parameter in teacher.parameters()]
    model, guide = compress_vae.freeze(teacher.model), compress_vae.freeze(teacher.guide)
    images = compress_vae.images_of(model, 500)

    def distances():
        generator = compress_vae.SurrogateKD(["x"]).loss(student.model, model, 500)
        return generator, compress_vae.SurrogateKD(["z"]).loss(student.guide, guide, 500, images)

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
