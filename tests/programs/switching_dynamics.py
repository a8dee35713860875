"""Switching linear dynamical system: a discrete regime picks the dynamics of a continuous state.

Exercises discrete and continuous latents that depend on each other over time, constrained ``PyroParam``, and
parameters indexed by a latent.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

from tests.programs import Program, trained

REGIMES, STATE, OUT = 3, 2, 4


class SLDS(PyroModule):
    def __init__(self):
        super().__init__()
        self.switches = PyroParam(torch.randn(REGIMES, REGIMES).softmax(-1), constraint=constraints.simplex)
        self.dynamics = PyroParam(0.5 * torch.randn(REGIMES, STATE, STATE))
        self.noise = PyroParam(0.3 + torch.rand(REGIMES, STATE), constraint=constraints.positive)
        self.emission = PyroParam(torch.randn(STATE, OUT))
        self.jitter = PyroParam(0.3 + torch.rand(OUT), constraint=constraints.positive)

    def forward(self, data):
        series, length, _ = data.shape
        with pyro.plate("series", series):
            regime, state = torch.zeros(series, dtype=torch.long), torch.ones(series, STATE)
            for t in pyro.markov(range(length)):
                regime = pyro.sample(f"regime_{t}", dist.Categorical(self.switches[regime]), infer={"enumerate": "parallel"})
                loc = (self.dynamics[regime] @ state.unsqueeze(-1)).squeeze(-1)
                state = pyro.sample(f"state_{t}", dist.Normal(loc, self.noise[regime]).to_event(1))
                pyro.sample(f"out_{t}", dist.Normal(state @ self.emission, self.jitter).to_event(1), obs=data[:, t])


def program():
    data = torch.randn(16, 5, OUT)
    return Program(trained(SLDS(), data), SLDS(), (data,))
