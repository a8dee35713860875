"""Linear Gaussian state-space model, written as a loop over time with multivariate normals.

Exercises ``pyro.markov``, ``MultivariateNormal`` by its Cholesky factor, and a parameter constrained to be one.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.programs import Program, trained

STATE, OUT = 3, 2


def model(data):
    transition = pyro.param("transition", lambda: 0.5 * torch.randn(STATE, STATE) / STATE**0.5)
    factor = pyro.param("factor", lambda: torch.diag(0.3 + 0.5 * torch.rand(STATE)), constraint=constraints.lower_cholesky)
    emission = pyro.param("emission", lambda: torch.randn(OUT, STATE))
    noise = pyro.param("noise", lambda: 0.3 + torch.rand(OUT), constraint=constraints.positive)
    batch, length, _ = data.shape
    with pyro.plate("series", batch):
        z = torch.zeros(batch, STATE)
        for t in pyro.markov(range(length)):
            z = pyro.sample(f"z_{t}", dist.MultivariateNormal(z @ transition.T, scale_tril=factor))
            pyro.sample(f"x_{t}", dist.Normal(z @ emission.T, noise).to_event(1), obs=data[:, t])


def program():
    data = torch.randn(16, 6, OUT)
    return Program(trained(model, data), model, (data,))
