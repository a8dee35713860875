"""The guide of a variational autoencoder, an amortised posterior, as a program of its own whose target is the code.

Exercises a conditional program without observed sites, two-headed networks and a learned positive scale.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import constraints

from tests.programs import Program, trained


class Encoder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(20, width), nn.Softplus())
        self.loc = nn.Linear(width, 3)
        self.log_scale = nn.Linear(width, 3)

    def forward(self, x):
        hidden = self.hidden(x)
        return self.loc(hidden), self.log_scale(hidden).exp()


def make_guide(width):
    encoder = Encoder(width)

    def guide(x):
        pyro.module("encoder", encoder)
        temperature = pyro.param("temperature", lambda: torch.rand(()) + 0.5, constraint=constraints.positive)
        with pyro.plate("data", x.shape[0]):
            loc, scale = encoder(x)
            pyro.sample("latent", dist.Normal(loc, temperature * scale).to_event(1))

    return guide


def program():
    x = torch.randn(32, 20)
    return Program(trained(make_guide(32), x), make_guide(8), (x,), {"targets": ["latent"]})
