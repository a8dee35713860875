"""Ordinal regression of answers on a scale from 0 to 4, with cut points in order.

Exercises ``OrderedLogistic``, a parameter constrained to an ordered vector, and a plate of respondents by group.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.programs import Program, trained


def model(group, answers):
    cuts = pyro.param("cuts", lambda: (2 * torch.randn(4)).sort().values, constraint=dist.constraints.ordered_vector)
    mean = pyro.param("mean", lambda: torch.randn(3))
    spread = pyro.param("spread", lambda: 0.2 + torch.rand(()), constraint=constraints.positive)
    with pyro.plate("groups", 3):
        location = pyro.sample("location", dist.Normal(mean, spread))
    with pyro.plate("respondents", len(answers)):
        pyro.sample("answer", dist.OrderedLogistic(location[group], cuts), obs=answers)


def program():
    args = torch.arange(60) % 3, torch.randint(5, (60,))
    return Program(trained(model, *args), model, args)
