"""Sparse regression with a regularised horseshoe: a slab bounds the scale of coefficients that escape shrinkage.

Exercises ``HalfCauchy`` latents of infinite mean, global and local scales in two plates, and a bounded function of both.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.programs import Program, trained

COLUMNS = 6


def model(x, y):
    center = pyro.param("center", lambda: torch.randn(COLUMNS))
    shrinkage = pyro.param("shrinkage", lambda: 0.1 + 0.3 * torch.rand(()), constraint=constraints.positive)
    widths = pyro.param("widths", lambda: 0.5 + torch.rand(COLUMNS), constraint=constraints.positive)
    noise = pyro.param("noise", lambda: 1 + torch.rand(()), constraint=constraints.positive)
    slab = pyro.param("slab", lambda: 1 + torch.rand(()), constraint=constraints.positive)
    tau = pyro.sample("tau", dist.HalfCauchy(shrinkage))
    with pyro.plate("columns", COLUMNS):
        lam = pyro.sample("lam", dist.HalfCauchy(widths))
        scale = slab * tau * lam / (slab.square() + (tau * lam).square()).sqrt()
        beta = pyro.sample("beta", dist.Normal(center, 0.05 + scale))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, noise), obs=y)


def program():
    args = torch.randn(50, COLUMNS), torch.randn(50)
    return Program(trained(model, *args), model, args)
