"""The continual VAE's experiment: the smoke preset, the parts, and what the old knowledge is made of."""

import pyro
import pytest
import torch

from examples import continual_vae
from models.conditional_vae import ConditionalVAE
from pyro_kd import freeze
from pyro_kd.datasets import Images


def test_the_smoke_preset_runs_with_every_method(tmp_path, capsys):
    place = ["--preset", "smoke", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    results = continual_vae.main(place)
    printed = capsys.readouterr().out
    models = results["runs"][0]["models"]
    assert next(iter(models)) == "before"
    assert {"fine-tuned", "CURL", "LGM", "surrogate (ours), mean W2², 0.1", "local, mean W2², 0.1"} <= set(models)
    assert set(results["tables"]) == {"samples", "elbo"}
    for name, figures in models.items():
        assert name in printed
        assert all(figures[f"{part}/fid"] >= 0 for part in ("old", "new"))
        assert all(torch.tensor(figures[f"{part}/bits"]).isfinite() for part in ("old", "new"))
    assert (tmp_path / "out" / "samples-0.png").read_bytes().startswith(b"\x89PNG")


def test_parts_are_disjoint_and_complete():
    images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    by_class = Images(images, torch.arange(40) % 10, tuple("0123456789"))
    old, new = continual_vae.parts_of(by_class, continual_vae.ContinualSettings(old_classes=(0, 3)))
    assert set(old.labels.tolist()) == {0, 3}
    assert len(old) + len(new) == 40
    by_attribute = Images(images, torch.stack([torch.arange(40) % 2, torch.zeros(40).long()], 1), ("Male", "Young"))
    old, new = continual_vae.parts_of(by_attribute, continual_vae.ContinualSettings(attribute="Male"))
    assert old.labels[:, 0].sum() == 0
    assert (len(old), len(new)) == (20, 20)
    with pytest.raises(SystemExit, match="the data has Male, Young"):
        continual_vae.parts_of(by_attribute, continual_vae.ContinualSettings(attribute="Smiling"))
    with pytest.raises(SystemExit, match="name one attribute"):
        continual_vae.parts_of(by_attribute, continual_vae.ContinualSettings())


def test_old_knowledge_pulls_back_to_the_old_model():
    """At the old weights, distillation has no gradient, and no method that holds old knowledge touches the new task's prior."""
    torch.manual_seed(0)
    vae = ConditionalVAE(32, 4, 2, 1, 2)
    model, guide = freeze(vae.model), freeze(vae.guide)
    x = torch.rand(5, 1, 32, 32)
    for name, objective in continual_vae.old_knowledge(vae, model, guide, 5).items():
        pyro.clear_param_store()
        if objective is None:
            assert name == "fine-tuned"
            continue
        vae.zero_grad()
        objective.value(0, (x,), {}).backward()
        norm = sum(p.grad.abs().sum() for p in vae.top_down.parameters() if p.grad is not None)
        is_distilled = name.startswith(("surrogate", "local"))
        assert (norm < 1e-2) == is_distilled, (name, norm)
        assert vae.top_prior.weight.grad[:, 1].abs().sum() == 0  # old knowledge says nothing about the new task
