"""The eight schools, in the non-centred form that ``poutine.reparam`` makes.

Exercises ``LocScaleReparam`` with a learned centring, and known standard errors as data.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch.distributions import constraints

from tests.programs import Program, trained

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


@poutine.reparam(config={"theta": LocScaleReparam()})
def model(effects, errors):
    prior = pyro.param("prior", lambda: 5 * torch.randn(()))
    width = pyro.param("width", lambda: 3 + 5 * torch.rand(()), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(prior, 10.0))
    tau = pyro.sample("tau", dist.HalfNormal(width))
    with pyro.plate("schools", len(effects)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, errors), obs=effects)


def program():
    return Program(trained(model, EFFECTS, ERRORS), model, (EFFECTS, ERRORS), lr=0.1)
