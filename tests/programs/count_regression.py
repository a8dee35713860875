"""Regression of two counts with an exposure, one Poisson and one negative binomial, on common random coefficients.

Exercises log-linear means with an offset, targets of unbounded counts, and a plate subsampled by index.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.programs import Program, trained

COLUMNS = 3


def model(x, exposure, visits, nights):
    loc = pyro.param("loc", lambda: 0.5 * torch.randn(COLUMNS))
    scale = pyro.param("scale", lambda: 0.1 + 0.1 * torch.rand(COLUMNS), constraint=constraints.positive)
    intercept = pyro.param("intercept", lambda: torch.rand(2))
    dispersion = pyro.param("dispersion", lambda: 1 + 3 * torch.rand(()), constraint=constraints.positive)
    beta = pyro.sample("beta", dist.Normal(loc, scale).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=50) as rows:
        log_rate = x[rows] @ beta + exposure[rows].log()
        pyro.sample("visits", dist.Poisson((intercept[0] + log_rate).exp()), obs=visits[rows])
        logits = intercept[1] + log_rate - dispersion.log()
        pyro.sample("nights", dist.NegativeBinomial(dispersion, logits=logits), obs=nights[rows])


def program():
    args = (0.5 * torch.randn(200, COLUMNS), 0.5 + torch.rand(200), torch.ones(200), torch.ones(200))
    return Program(trained(model, *args), model, args)
