"""Exported densities: log p(y, z | x) of Pyro, by row, given all values."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from models.vae import VAE
from pyro_kd.errors import UnsupportedExportError
from pyro_kd.export import export_density, load


def test_the_density_of_a_model_and_of_its_guide():
    program, x = VAE(12, 3, [8]), torch.rand(6, 12).round()
    model, guide = export_density(program.model, 6), export_density(program.guide, 6, x)
    assert [item.name for item in model.description.inputs] == ["z", "x"]
    assert [item.name for item in guide.description.inputs] == ["z", "x"]
    assert model.description.outputs[0].shape == ("rows",)
    new = torch.rand(9, 12).round()
    with torch.no_grad():
        drawn = poutine.trace(program.guide).get_trace(9, new)
        z = drawn.nodes["z"]["value"]
        scored = poutine.trace(poutine.condition(program.model, {"z": z})).get_trace(9, new)
    torch.testing.assert_close(guide({"z": z, "x": new})["log_prob"].sum(), drawn.log_prob_sum())
    torch.testing.assert_close(model({"z": z, "x": new})["log_prob"].sum(), scored.log_prob_sum())
    assert guide({"z": z, "x": new})["log_prob"].shape == (9,)


def test_sites_outside_the_rows_masks_scales_and_factors_count_as_in_pyro():
    def model(num_rows, y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        pyro.factor("penalty", -(loc**2))
        with pyro.plate("rows", num_rows), poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Normal(loc, 1.0).expand([3]).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0).mask(z[..., 0] > 0), obs=y)

    exported = export_density(model, 4)
    values = {"loc": torch.tensor(0.7), "z": torch.randn(5, 3), "y": torch.randn(5)}
    found = exported(values)
    trace = poutine.trace(poutine.condition(model, values)).get_trace(5)
    torch.testing.assert_close(found["log_prob"].sum() + found["log_prob_shared"], trace.log_prob_sum())
    shared = dist.Normal(0.0, 2.0).log_prob(values["loc"]) - values["loc"] ** 2
    torch.testing.assert_close(found["log_prob_shared"], shared)


def test_sites_that_are_left_out_must_be_observed():
    def model(num_rows, y=None):
        with pyro.plate("rows", num_rows):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    with pytest.raises(UnsupportedExportError, match="the program draws 'z', and a density needs their values too"):
        export_density(model, 4, torch.zeros(4), values=["y"])
    with pytest.raises(UnsupportedExportError, match="no sites 'w', which values names; it has 'z', 'y'"):
        export_density(model, 4, values=["y", "z", "w"])
    exported = export_density(model, 4, torch.ones(4), values=["z"])
    z, y = torch.randn(6), torch.randn(6)
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(y)
    torch.testing.assert_close(exported({"z": z, "y": y})["log_prob"], expected)


def test_draws_between_sites_are_refused():
    def model(num_rows):
        with pyro.plate("rows", num_rows):
            pyro.sample("y", dist.Normal(torch.randn(num_rows), 1.0))

    with pytest.raises(UnsupportedExportError, match="draws outside of its sample sites"):
        export_density(model, 4)


@pytest.mark.parametrize("family", ["normal", "categorical", "data"])
def test_a_density_loads_as_what_was_written(tmp_path, family):
    """Its graph has a factor of each plate, the full size over the rows of the call: an expression with floats."""

    def program(rows, x=None):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if family == "categorical":
                pyro.sample("y", dist.Categorical(logits=torch.stack([z, -z], -1)))
            elif family == "data":
                pyro.sample("y", dist.Bernoulli(logits=z), obs=x)
            else:
                pyro.sample("y", dist.Normal(z, 0.5))

    x = torch.tensor([0.0, 1.0] * 32) if family == "data" else None
    made = export_density(program, 64, x, path=tmp_path / "density.pt2")
    read = load(tmp_path / "density.pt2")
    values = {"z": torch.randn(64), "y": x if family == "data" else torch.tensor([0, 1] * 32)}
    values["y"] = values["y"].long() if family == "categorical" else values["y"].float()
    inputs = {
        item.name: values.get(item.name, x)[:64].to(getattr(torch, str(item.dtype))) for item in made.description.inputs
    }
    for name, expected in made(inputs).items():
        assert torch.equal(read(inputs)[name], expected)


def test_a_loaded_program_is_not_saved_as_onnx(tmp_path):
    def program(rows):
        with pyro.plate("rows", rows):
            pyro.sample("y", dist.Normal(0.0, 0.5))

    export_density(program, 64, path=tmp_path / "density.pt2")
    with pytest.raises(UnsupportedExportError, match=r"save the ONNX file when the program is exported"):
        load(tmp_path / "density.pt2").save(tmp_path / "density.onnx")
