"""Cormack-Jolly-Seber model of capture and recapture, with survival and recapture rates of every season.

Exercises an absorbing state (a probability of exactly 0), ``poutine.mask`` by each animal's first capture, a plate of
animals around a loop over time, and parallel enumeration. Survival is a target beside the captures: an animal that is dead
in the student alone would be caught with probability 0.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch.distributions import constraints

from tests.programs import Program, trained


def model(captures):
    animals, seasons = captures.shape
    survival = pyro.param("survival", lambda: 1 + 4 * torch.rand(2), constraint=constraints.positive)
    recapture = pyro.param("recapture", lambda: 0.2 + 0.6 * torch.rand(seasons), constraint=constraints.unit_interval)
    phi = pyro.sample("phi", dist.Beta(survival[0], survival[1]))
    with pyro.plate("animals", animals, dim=-1):
        alive = torch.ones(animals)
        caught_before = torch.zeros(animals, dtype=torch.bool)
        for t in pyro.markov(range(seasons)):
            with poutine.mask(mask=caught_before):
                survives = caught_before.float() * phi * alive + (~caught_before).float()
                alive = pyro.sample(f"alive_{t}", dist.Bernoulli(survives), infer={"enumerate": "parallel"})
                pyro.sample(f"caught_{t}", dist.Bernoulli(recapture[t] * alive), obs=captures[:, t])
            caught_before = caught_before | captures[:, t].bool()


def is_target(site):
    return site["name"].startswith(("alive", "caught"))


def program():
    captures = dist.Bernoulli(0.5).sample((40, 5))
    captures[:, 0] = 1
    return Program(trained(model, captures), model, (captures,), {"targets": is_target})
