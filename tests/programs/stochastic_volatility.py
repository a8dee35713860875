"""Stochastic volatility of daily returns: log-volatility is a random walk, and returns have heavy tails.

Exercises ``StableReparam`` of a latent without a density and a sum over a plate of days.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import StableReparam
from torch.distributions import constraints

from tests.programs import Program, trained


@poutine.reparam(config={"jump": StableReparam()})
def model(returns):
    center = pyro.param("center", lambda: torch.randn(()) - 1)
    stability = pyro.param("stability", lambda: 1.2 + 0.6 * torch.rand(()), constraint=constraints.interval(1.1, 2.0))
    scale = pyro.param("scale", lambda: 0.05 + 0.1 * torch.rand(()), constraint=constraints.positive)
    drift = pyro.param("drift", lambda: 0.5 * torch.randn(()))
    start = pyro.sample("start", dist.Normal(center, 0.3))
    with pyro.plate("days", len(returns)):
        step = pyro.sample("step", dist.Normal(0.0, scale))
        jump = pyro.sample("jump", dist.Stable(stability, 0.0, 0.1 * scale, drift))
        volatility = (start + step.cumsum(-1)).exp()
        pyro.sample("return", dist.Normal(jump, volatility), obs=returns)


def program():
    returns = torch.randn(40)
    return Program(trained(model, returns), model, (returns,))
