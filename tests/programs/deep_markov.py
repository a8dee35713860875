"""Deep Markov model of polyphonic music: a gated Gaussian transition and a Bernoulli emitter, both networks.

Exercises ``pyro.markov``, sequences of unequal lengths with ``.mask(...)`` at every site, and ``poutine.scale`` for
annealing.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn

from tests.programs import Program, trained

NOTES, STATE = 8, 3


class Transition(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(STATE, width), nn.ReLU(), nn.Linear(width, STATE), nn.Sigmoid())
        self.proposal = nn.Sequential(nn.Linear(STATE, width), nn.ReLU(), nn.Linear(width, STATE))
        self.linear = nn.Linear(STATE, STATE)
        self.log_scale = nn.Linear(STATE, STATE)

    def forward(self, z):
        gate, proposal = self.gate(z), self.proposal(z)
        return (1 - gate) * self.linear(z) + gate * proposal, nn.functional.softplus(self.log_scale(proposal.relu()))


class DMM(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.transition = Transition(width)
        self.emitter = nn.Sequential(nn.Linear(STATE, width), nn.ReLU(), nn.Linear(width, NOTES), nn.Sigmoid())
        self.z_0 = nn.Parameter(torch.randn(STATE))

    def model(self, sequences, mask, annealing_factor=1.0):
        pyro.module("dmm", self)
        z = self.z_0.expand(len(sequences), STATE)
        with pyro.plate("sequences", len(sequences)):
            for t in pyro.markov(range(sequences.shape[1])):
                loc, scale = self.transition(z)
                with poutine.scale(scale=annealing_factor):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, scale).mask(mask[:, t : t + 1]).to_event(1))
                notes = dist.Bernoulli(self.emitter(z)).mask(mask[:, t : t + 1]).to_event(1)
                pyro.sample(f"x_{t}", notes, obs=sequences[:, t])


def program():
    lengths = torch.tensor([6, 6, 5, 4, 4, 3, 2, 1])
    mask = torch.arange(6) < lengths[:, None]
    sequences = dist.Bernoulli(0.3).sample((8, 6, NOTES))
    args = (sequences, mask, 0.5)
    return Program(trained(DMM(20).model, *args), DMM(6).model, args)
