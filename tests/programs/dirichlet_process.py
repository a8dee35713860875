"""Dirichlet process mixture of Poissons, truncated, by breaking a stick.

Exercises a Beta plate, weights by ``cumprod``, and ``MixtureSameFamily`` at a second site beside an explicit assignment.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints
from torch.nn.functional import pad

from tests.programs import Program, trained

STICKS = 5


def mix_weights(beta):
    return pad(beta, (0, 1), value=1) * pad((1 - beta).cumprod(-1), (1, 0), value=1)


def model(counts, sizes):
    alpha = pyro.param("alpha", lambda: 0.5 + 2 * torch.rand(()), constraint=constraints.positive)
    shape = pyro.param("shape", lambda: 2 + 8 * torch.rand(STICKS), constraint=constraints.positive)
    center = pyro.param("center", lambda: 2 * torch.randn(STICKS))
    with pyro.plate("breaks", STICKS - 1):
        beta = pyro.sample("beta", dist.Beta(1, alpha))
    with pyro.plate("sticks", STICKS):
        rate = pyro.sample("rate", dist.Gamma(shape, 1.0))
        loc = pyro.sample("loc", dist.Normal(center, 0.5))
    weights = mix_weights(beta)
    with pyro.plate("days", len(counts)):
        cluster = pyro.sample("cluster", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("count", dist.Poisson(rate[cluster]), obs=counts)
    with pyro.plate("people", len(sizes)):
        mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 1.0))
        pyro.sample("size", mixture, obs=sizes)


def program():
    args = (dist.Poisson(4.0).sample((30,)), torch.randn(30))
    return Program(trained(model, *args), model, args, lr=0.05)
