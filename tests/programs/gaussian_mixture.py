"""Gaussian mixture with priors on weights, locations and the common scale.

Exercises a plate of components, ``config_enumerate`` on assignments, and hyper-parameters as constrained ``pyro.param``.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from torch.distributions import constraints

from tests.programs import Program, trained

COMPONENTS = 3


@config_enumerate
def model(data):
    concentration = pyro.param("concentration", lambda: 1 + 5 * torch.rand(COMPONENTS), constraint=constraints.positive)
    center = pyro.param("center", lambda: 3 * torch.randn(COMPONENTS))
    spread = pyro.param("spread", lambda: 0.2 + torch.rand(()), constraint=constraints.positive)
    noise = pyro.param("noise", lambda: torch.randn(()))
    weights = pyro.sample("weights", dist.Dirichlet(concentration))
    scale = pyro.sample("scale", dist.LogNormal(noise, 0.3))
    with pyro.plate("components", COMPONENTS):
        locs = pyro.sample("locs", dist.Normal(center, spread))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)


def program():
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0, -4.0, -5.0])
    return Program(trained(model, data), model, (data,), lr=0.05)
