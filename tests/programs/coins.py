"""Tosses of two kinds of coin, one toss a turn of a loop over a plate.

Exercises a sequential plate (``for i in pyro.plate(...)``) with subsampling, and scalar sites named by an index.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.programs import Program, trained


def model(tosses, kinds):
    alpha = pyro.param("alpha", lambda: 1 + 9 * torch.rand(2), constraint=constraints.positive)
    beta = pyro.param("beta", lambda: 1 + 9 * torch.rand(2), constraint=constraints.positive)
    fairness = [pyro.sample(f"fairness_{kind}", dist.Beta(alpha[kind], beta[kind])) for kind in range(2)]
    for i in pyro.plate("tosses", len(tosses), subsample_size=10):
        pyro.sample(f"toss_{i}", dist.Bernoulli(fairness[kinds[i]]), obs=tosses[i])


def program():
    args = dist.Bernoulli(0.5).sample((30,)), [0, 1] * 15
    return Program(trained(model, *args), model, args, lr=0.1)
