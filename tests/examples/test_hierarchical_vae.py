"""The hierarchical VAE's experiment: both studies in the smoke preset, and the cached teacher."""

import json

import pytest
import torch

from examples import hierarchical_vae
from examples._images import FeatureNetwork, distances, load
from examples._training import distil
from models.hierarchical_vae import HierarchicalVAE
from pyro_kd import freeze
from tests.support.data_files import pixels, write_idx


def test_both_studies_run_and_share_trained_models(tmp_path, capsys):
    place = ["--preset", "smoke", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    results = hierarchical_vae.main(place)
    printed = capsys.readouterr().out
    assert "trained before" not in printed
    assert set(results["tables"]) == {"teacher", "data", "bounds"}
    models = results["runs"][0]["models"]
    assert list(models) == ["teacher", "scratch", *hierarchical_vae.RECIPES]
    for name, figures in models.items():
        assert name in printed
        assert figures["teacher/fid"] >= 0
        assert 0 <= figures["data/nn"] <= 1
        if name != "teacher":
            assert figures["bound"] > 0
            assert figures["local_bound"] > 0
    assert models["teacher"]["teacher/fid"] < models["scratch"]["teacher/fid"]
    assert (tmp_path / "out" / "samples-0.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"] == results["runs"]

    place[place.index("--out") + 1] = str(tmp_path / "sweep")
    sweep = hierarchical_vae.main([*place, "--study", "sweep"])
    assert capsys.readouterr().out.count("trained before") == 5  # features, teacher, and students that were needed before
    assert list(sweep["runs"][0]["models"]) == [
        "teacher",
        "local, width 4",
        "surrogate (ours), width 4",
        "surrogate (ours), weight 0.1",
    ]
    assert sweep["runs"][0]["models"]["teacher"] == models["teacher"]
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_distillation_brings_a_student_nearer():
    torch.manual_seed(0)
    settings = hierarchical_vae.HierarchicalSettings(steps=15, rows=16)
    teacher = freeze(HierarchicalVAE(32, 8, 1, 4).model)
    for name, recipe in hierarchical_vae.RECIPES.items():
        torch.manual_seed(0)
        student, bound = HierarchicalVAE(32, 4, 1, 4), recipe.loss()
        before = bound.loss(student.model, teacher, 100)
        distil(student.model, teacher, recipe.loss(), 16, weight=1 / 16, steps=15, settings=settings, label=name)
        assert bound.loss(student.model, teacher, 100) < before, name


def test_the_distances_of_one_law_are_small_and_of_two_are_not():
    torch.manual_seed(0)
    x, y = torch.randn(300, 4), torch.randn(300, 4)
    same, other = distances(x, y), distances(x, y + 3)
    assert all(same[key] < other[key] for key in ("fid", "emd", "mmd"))
    assert abs(same["nn"] - 0.5) < 0.1 < other["nn"] - 0.5


@pytest.mark.parametrize("mode", [True, False])
def test_features_do_not_depend_on_the_batch(mode):
    network = FeatureNetwork(3, 10).train(mode)
    x = torch.rand(6, 3, 32, 32)
    features = network.features(x)
    assert features.shape == (6, 64)
    torch.testing.assert_close(network.features(x[:2]), features[:2])


def test_idx_files_come_in_the_size_that_the_model_takes(tmp_path):
    write_idx(tmp_path, pixels(3, 28, 28), [0, 1, 1])
    settings = hierarchical_vae.HierarchicalSettings(data="idx", data_root=str(tmp_path))
    assert load(settings, train=True).images.shape == (3, 1, 32, 32)
