"""The state-space model with its states integrated out: ``dist.GaussianHMM`` as one observed site.

Exercises a target whose law is a whole time series, without a closed-form divergence, and a student of fewer hidden states.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.programs import Program, trained

LENGTH, OUT = 8, 2


def make(states):
    def model(data):
        transition = pyro.param("transition", lambda: 0.5 * torch.randn(states, states) / states**0.5)
        emission = pyro.param("emission", lambda: torch.randn(states, OUT))
        q = pyro.param("q", lambda: 0.3 + torch.rand(states), constraint=constraints.positive)
        r = pyro.param("r", lambda: 0.3 + torch.rand(OUT), constraint=constraints.positive)
        hmm = dist.GaussianHMM(
            dist.Normal(torch.zeros(states), 1.0).to_event(1),
            transition,
            dist.Normal(torch.zeros(states), q).to_event(1),
            emission,
            dist.Normal(torch.zeros(OUT), r).to_event(1),
            duration=LENGTH,
        )
        with pyro.plate("series", len(data)):
            pyro.sample("x", hmm, obs=data)

    return model


def program():
    data = torch.randn(12, LENGTH, OUT)
    return Program(trained(make(4), data), make(2), (data,))
