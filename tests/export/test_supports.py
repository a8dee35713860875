"""Values outside of the support of a site: an exported density refuses them, and names the site and the support."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd.errors import CorruptExportError, UnsupportedExportError
from pyro_kd.export import Description, export_density, load, load_onnx
from pyro_kd.export.description import Support


def exported(family, path=None):
    """The density of a program whose site ``y`` has a distribution that depends on the site ``z``."""

    def program(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", family(z))

    return export_density(program, 4, path=path)


def inputs(density, value):
    y = next(item for item in density.description.inputs if item.name == "y")
    shape = [3 if size == "rows" else size for size in y.shape]
    return {"z": torch.zeros(3), "y": torch.full(shape, value).to(getattr(torch, y.dtype))}


def three(z):
    return torch.stack([z, -z, z], -1)


@pytest.mark.parametrize(
    ("family", "good", "bad", "support"),
    [
        (lambda z: dist.Categorical(logits=three(z)), 2, [3, -1], "whole numbers from 0 to 2"),
        (lambda z: dist.Categorical(logits=three(z)).mask(z > 0), 2, [3], "whole numbers from 0 to 2"),
        (lambda z: dist.OrderedLogistic(z, torch.tensor([0.0, 1.0])), 2, [3], "whole numbers from 0 to 2"),
        (lambda z: dist.Bernoulli(logits=z), 1, [2, 0.5], "whole numbers from 0 to 1"),
        (lambda z: dist.Bernoulli(logits=three(z)).to_event(1), 1, [-1], "whole numbers from 0 to 1"),
        (lambda z: dist.Binomial(5, logits=z), 5, [6], "whole numbers from 0 to 5"),
        (lambda z: dist.Poisson(z.exp()), 7, [-1, 0.5], "whole numbers from 0"),
        (lambda z: dist.Gamma(z.exp(), 1.0), 3.5, [-0.5, float("nan")], "numbers from 0"),
        (lambda z: dist.Beta(z.exp(), 1.0), 0.5, [1.5], "numbers from 0 to 1"),
        (lambda z: dist.Dirichlet(torch.ones(4)), 0.25, [-0.5], "numbers from 0"),
        (lambda z: dist.Multinomial(3, logits=three(z)), 1, [4, -1], "whole numbers from 0 to 3"),
    ],
)
def test_a_value_outside_of_the_support_names_the_site_and_the_support(family, good, bad, support):
    density = exported(family)
    assert density(inputs(density, good))["log_prob"].isfinite().all()
    for value in bad:
        with pytest.raises(
            UnsupportedExportError, match=f"input 'y' holds {value:g}, .* its site: {support}\\. Pass values"
        ):
            density(inputs(density, value))


@pytest.mark.parametrize(
    "family",
    [
        lambda z: dist.Normal(z, 1.0),
        lambda z: dist.Uniform(z, z + 1),  # its density is 0 outside
        lambda z: dist.Bernoulli(logits=z).mask(z > 0),  # the mask may hide the value
        lambda z: dist.Bernoulli(logits=z, validate_args=False),  # the program takes shades of grey
        lambda z: dist.VonMises(z, 1.0),
    ],
    ids=["real", "uniform", "masked", "not validated", "circular"],
)
def test_what_a_program_may_take_is_not_refused(family):
    density = exported(family)
    density(inputs(density, 3.5))
    assert all(item.support is None for item in density.description.inputs)


def test_bounds_that_differ_by_row_are_left_out():
    density = exported(lambda z: dist.Binomial(1 + (z > 0).float(), logits=z))
    assert density.description.inputs[1].support == Support(0.0, None, is_whole=True)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_file_keeps_the_support(tmp_path, suffix):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
        pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    path = tmp_path / f"density{suffix}"
    density = exported(lambda z: dist.Categorical(logits=three(z)), path)
    wrong = inputs(density, 3)
    if suffix == ".onnx":
        loaded, wrong = load_onnx(path), {name: value.numpy() for name, value in wrong.items()}
    else:
        loaded = load(path)
    assert loaded.description == density.description
    with pytest.raises(UnsupportedExportError, match="whole numbers from 0 to 2"):
        loaded(wrong)


@pytest.mark.parametrize(
    ("entry", "other"),
    [
        ('"low": 0.0', '"low": "0"'),
        ('"low": 0.0', '"low": true'),
        ('"high": null', '"high": Infinity'),
        ('"is_whole": true', '"is_whole": 1'),
        ('"is_whole": true', '"whole": true'),
    ],
)
def test_an_entry_of_a_support_that_is_wrong_is_damage(entry, other):
    text = exported(lambda z: dist.Poisson(z.exp())).description.to_json()
    damaged = text.replace(entry, other)
    assert damaged != text
    with pytest.raises(CorruptExportError, match="is damaged"):
        Description.from_json(damaged)
    old = text.replace('"support"', '"other"')  # as written before there were supports
    assert all(item.support is None for item in Description.from_json(old).inputs)
