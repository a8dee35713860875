"""Hierarchical regression in the style of the radon data: an intercept and a slope for every county, partially pooled.

Exercises a plate of groups indexed by a plate of rows, ``HalfCauchy`` and ``LKJCholesky`` priors, and
``pyro.deterministic``.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.programs import Program, trained

COUNTIES = 8


def model(county, floor, log_radon=None):
    mean = pyro.param("mean", lambda: torch.randn(2))
    uncertainty = pyro.param("uncertainty", lambda: 0.2 + torch.rand(2), constraint=constraints.positive)
    heaviness = pyro.param("heaviness", lambda: 0.2 + torch.rand(2), constraint=constraints.positive)
    concentration = pyro.param("concentration", lambda: 1 + torch.rand(()), constraint=constraints.positive)
    noise = pyro.param("noise", lambda: torch.rand(()))
    mu = pyro.sample("mu", dist.Normal(mean, uncertainty).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(heaviness).to_event(1))
    correlation = pyro.sample("correlation", dist.LKJCholesky(2, concentration))
    with pyro.plate("counties", COUNTIES):
        effect = pyro.sample("effect", dist.MultivariateNormal(mu, scale_tril=sigma.diag_embed() @ correlation))
    prediction = pyro.deterministic("prediction", effect[county, 0] + effect[county, 1] * floor)
    scale = pyro.sample("scale", dist.LogNormal(noise, 0.25))
    with pyro.plate("rows", len(county)):
        pyro.sample("y", dist.Normal(prediction, scale), obs=log_radon)


def program():
    args = (torch.arange(40) % COUNTIES, torch.arange(40) % 3 * 0.5)
    return Program(trained(model, *args), model, args, {"targets": ["y"]})
