"""Mixed-effects hidden Markov model of animal movement: random effects of group and individual on the transitions.

Exercises nested plates by dimension, random effects inside logits, ``poutine.mask``, and Gamma, von Mises and zero-inflated
targets in one model.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch.distributions import constraints

from tests.programs import Program, trained

STATES = 3


def positive(name):
    return pyro.param(name, lambda: 0.5 + 2 * torch.rand(STATES), constraint=constraints.positive)


def model(steps, turns, dives, lengths):
    groups, individuals, times = steps.shape
    initial = pyro.param("initial", lambda: torch.randn(STATES))
    transition = pyro.param("transition", lambda: torch.randn(STATES, STATES))
    sd_group = pyro.param("sd_group", lambda: 0.3 + torch.rand(()), constraint=constraints.positive)
    sd_individual = pyro.param("sd_individual", lambda: 0.3 + torch.rand(()), constraint=constraints.positive)
    shape, rate, focus, depth = (positive(name) for name in ("step_shape", "step_rate", "focus", "depth"))
    gate = pyro.param("gate", lambda: 0.2 + 0.6 * torch.rand(STATES), constraint=constraints.unit_interval)
    with pyro.plate("groups", groups, dim=-2):
        by_group = pyro.sample("by_group", dist.Normal(torch.zeros(STATES), sd_group).to_event(1))
        with pyro.plate("individuals", individuals, dim=-1), poutine.mask(mask=lengths > 0):
            by_individual = pyro.sample("by_individual", dist.Normal(torch.zeros(STATES), sd_individual).to_event(1))
            effect = by_group + by_individual
            logits = initial + effect
            for t in pyro.markov(range(times)):
                with poutine.mask(mask=t < lengths):
                    y = pyro.sample(f"y_{t}", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
                    pyro.sample(f"step_{t}", dist.Gamma(shape[y], rate[y]), obs=steps[..., t])
                    pyro.sample(f"turn_{t}", dist.VonMises(torch.zeros(()), focus[y]), obs=turns[..., t])
                    dive = dist.ZeroInflatedPoisson(depth[y], gate=gate[y])
                    pyro.sample(f"dive_{t}", dive, obs=dives[..., t])
                logits = transition[y] + effect


def program():
    lengths = torch.tensor([[4, 4, 3], [4, 2, 0]])
    steps = 0.1 + torch.rand(2, 3, 4)
    turns = 3 * (2 * torch.rand(2, 3, 4) - 1)
    args = (steps, turns, dist.Poisson(2.0).sample((2, 3, 4)), lengths)
    return Program(trained(model, *args), model, args)
