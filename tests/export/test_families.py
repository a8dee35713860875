"""Families whose samplers torch cannot trace as they are, exported; and the reason for those that cannot be."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import StableReparam

from pyro_kd.errors import UnsupportedExportError
from pyro_kd.export import export_sampler
from pyro_kd.export.stable import stable_laws_traceable
from tests.support.families import FAMILIES

HOLE = torch.tensor([0.5, 0.985, 0.994, 0.9999, 1.0, 1.004, 1.02, 1.9], dtype=torch.float64)  # Pyro's formulas fail at 1


def exported(name, rows):
    family = FAMILIES[name]

    def model(num_rows):
        with pyro.plate("rows", num_rows, dim=-1 - len(family().batch_shape)):
            pyro.sample("x", family())

    def single():
        pyro.sample("x", family())

    return export_sampler(model, rows, targets=["x"]) if rows else export_sampler(single, targets=["x"])


@pytest.mark.parametrize("name", ["GeneralizedPareto", "ProjectedNormal", "Stable", "StableWithLogProb"])
def test_families_are_exported_for_any_number_of_rows(float64, name):
    """A bound that is infinite for some parameters, writes to Tensor.data, and a branch around a hole of the formulas."""
    sampler = exported(name, 7)
    assert sampler.description.has_rows
    assert sampler.report.largest_difference < 1e-12


@pytest.mark.parametrize("name", ["GaussianHMM", "IndependentHMM"])
def test_gaussian_chains_are_exported_for_fixed_sizes(float64, name):
    assert exported(name, 0).report.largest_difference < 1e-12


def draw(coords, reparam):
    """A batch of stable draws with stabilities around 1."""
    fn = dist.Stable(HOLE, torch.linspace(-0.9, 0.8, 8), 1.5, 0.3, coords)
    with poutine.reparam(config={"x": StableReparam()} if reparam else {}):
        return pyro.sample("x", fn)


@pytest.mark.parametrize(("coords", "reparam"), [("S0", False), ("S", False), ("S0", True)])
def test_stable_laws_without_branches_are_those_of_pyro(float64, coords, reparam):
    for seed in range(20):
        pyro.set_rng_seed(seed)
        expected = draw(coords, reparam)
        pyro.set_rng_seed(seed)
        with stable_laws_traceable():
            torch.testing.assert_close(draw(coords, reparam), expected, rtol=1e-11, atol=1e-11)
    assert "pyro_kd" not in dist.stable._standard_stable.__module__


@pytest.mark.parametrize("name", ["SineSkewed", "SineBivariateVonMises"])
def test_a_family_that_checks_its_parameters_is_named(float64, name):
    with pytest.raises(
        UnsupportedExportError,
        match=f"before its first site at .* depends on the values of tensors .*{name} looks at the values of its parameters when it is made",
    ):
        exported(name, 7)
