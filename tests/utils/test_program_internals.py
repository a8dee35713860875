"""What is read of a program's parameters and plates through private names of Pyro and torch."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_kd.utils.pyro_internals import constraint_in_store, constraints_of_module, dotted_name, guess_plate_nesting
from pyro_kd.utils.torch_internals import parts_of_module, persistent_tensors


def test_the_constraint_of_a_stored_parameter():
    pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    assert constraint_in_store("scale") is constraints.positive


def test_the_constraints_of_a_module():
    class Scaled(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    assert constraints_of_module(Scaled()) == {"scale": constraints.positive}
    assert constraints_of_module(nn.Linear(1, 1)) == {}


def test_parameters_of_a_registered_module_have_dotted_names():
    pyro.module("net", nn.Linear(1, 1, bias=False))
    assert [dotted_name(key) for key in pyro.get_param_store()] == ["net.weight"]


@pytest.mark.parametrize(
    ("elbo", "depth"),
    [
        (TraceEnum_ELBO(), 1),
        (Trace_ELBO(num_particles=2, vectorize_particles=True), 2),  # the particles are a plate too
        (Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=3), 4),
        (Trace_ELBO(), float("inf")),
    ],
)
def test_the_depth_of_plates_is_guessed_only_where_pyro_would(elbo, depth):
    def model():
        with pyro.plate("rows", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(2))

    guess_plate_nesting(elbo, model, lambda: None, (), {})
    assert elbo.max_plate_nesting == depth


def test_the_parts_and_the_persistent_tensors_of_a_module():
    module = nn.Sequential(nn.Linear(1, 1))
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    module.register_parameter("none", None)
    assert parts_of_module(module) == {"none": None, "kept": module.kept, "scratch": module.scratch, "0": module[0]}
    assert persistent_tensors(module) == {"kept": module.kept}
    assert persistent_tensors(module[0]).keys() == {"weight", "bias"}
