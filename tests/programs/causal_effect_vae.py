"""Causal effect variational autoencoder: a hidden confounder behind proxies, a treatment and an outcome.

Exercises ``PyroModule`` networks without ``pyro.module``, an outcome that picks its network by an observed treatment, and
targets that condition later targets.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from tests.programs import Program, trained

CONFOUNDER, BINARY, REAL = 3, 4, 4


def network(width, outputs):
    return PyroModule[nn.Sequential](
        PyroModule[nn.Linear](CONFOUNDER, width), PyroModule[nn.ELU](), PyroModule[nn.Linear](width, outputs)
    )


class CausalModel(PyroModule):
    def __init__(self, width):
        super().__init__()
        self.binary = network(width, BINARY)
        self.real = network(width, 2 * REAL)
        self.treatment = network(width, 1)
        self.untreated = network(width, 2)
        self.treated = network(width, 2)

    def forward(self, x_binary, x_real, t=None, y=None):
        with pyro.plate("data", len(x_real)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([CONFOUNDER]).to_event(1))
            pyro.sample("x_binary", dist.Bernoulli(logits=self.binary(z)).to_event(1), obs=x_binary)
            loc, raw = self.real(z).chunk(2, -1)
            pyro.sample("x_real", dist.Normal(loc, nn.functional.softplus(raw) + 0.1).to_event(1), obs=x_real)
            t = pyro.sample("t", dist.Bernoulli(logits=self.treatment(z).squeeze(-1)), obs=t)
            outcome = torch.where(t[..., None] > 0, self.treated(z), self.untreated(z))
            pyro.sample("y", dist.Laplace(outcome[..., 0], outcome[..., 1].exp()), obs=y)


def program():
    data = (
        dist.Bernoulli(0.5).sample((64, BINARY)),
        torch.randn(64, REAL),
        dist.Bernoulli(0.5).sample((64,)),
        torch.randn(64),
    )
    return Program(trained(CausalModel(16), *data), CausalModel(5), data)
