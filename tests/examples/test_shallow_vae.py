"""VAEs of fewer layers: which layers are paired, what the noise of a layer moves, and the smoke preset."""

import json
import math

import pyro
import torch

from examples import shallow_vae
from models.hierarchical_vae import HierarchicalVAE
from pyro_kd import LocalKD, freeze
from pyro_kd.metrics import Estimate
from tests.support.estimates import assert_within
from tests.support.losses import SurrogateKD
from tests.support.runs import only_run


def test_layers_are_paired_at_the_same_resolution():
    assert shallow_vae.pairs_of((5, 2)) == {"site_map": {"z2": "z5", "z1": "z2"}, "fresh": ["z4", "z3", "z1"]}
    teacher = freeze(HierarchicalVAE(32, 4, 1, 2).model)
    for keep in ((5, 1), (5, 2), (5, 4, 2)):
        pyro.clear_param_store()
        student = HierarchicalVAE(32, 4, 1, 2, sides=shallow_vae.sides_of(keep, 32))
        for kind in (SurrogateKD, LocalKD):
            run = only_run(kind(["x"], **shallow_vae.pairs_of(keep)), student.model, teacher, 2)
            assert [pair.name for pair in run.pairs] == [*(f"z{layer}" for layer in keep), "x"]


def test_new_noise_of_a_layer_moves_the_images_that_depend_on_it():
    def program(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
            pyro.sample("unused", pyro.distributions.Normal(0.0, 1.0))
            return 3 * z.unsqueeze(-1)

    assert shallow_vae.moved_by(program, ["unused"], 1000) == 0
    moved = [shallow_vae.moved_by(program, ["z"], 1000) for _ in range(20)]
    assert_within(Estimate.of(torch.tensor(moved)), 2 * 3.0**2)


def test_the_smoke_preset_runs(tmp_path, capsys):
    place = ["--preset", "smoke", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    results = shallow_vae.main(place)
    printed = capsys.readouterr().out
    assert set(results["tables"]) == {"layers", "teacher", "data"}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert len(results["runs"][0]["models"]) == 9
    for name, figures in results["runs"][0]["models"].items():
        assert name in printed
        assert all(math.isfinite(value) for value in figures.values())
    assert (tmp_path / "out" / "samples-0.png").read_bytes().startswith(b"\x89PNG")
