"""Programs that draw noise between their sample sites."""

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import nn

ROWS = 64


class Program(nn.Module):
    """A program with one parameter, which is a log standard deviation, a logit or a log rate."""

    def __init__(self, start=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(start))


class ByHand(Program):
    def forward(self):
        hidden = 1.0 + self.weight.exp() * torch.randn(ROWS)
        with pyro.plate("rows", ROWS):
            pyro.sample("y", dist.Normal(hidden, 0.5))


class Called(Program):
    def forward(self):
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", dist.Normal(self.weight, 1.0))
            scale = dist.LogNormal(z, 0.1)()
            weight = dist.Gamma(scale, 1.0).rsample()
            pyro.sample("y", dist.Normal(z, 0.1 + weight))


class DropsOut(Program):
    def forward(self):
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), self.weight.exp()).to_event(1))
            pyro.sample("y", dist.Normal(F.dropout(z, 0.3).sum(-1), 1.0))
            z = F.dropout(z, 0.3)
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


class Relaxed(Program):
    def forward(self):
        with pyro.plate("rows", ROWS):
            logits = torch.stack([self.weight, -self.weight, torch.zeros(())]).expand(ROWS, 3)
            pyro.sample("y", dist.Normal(F.gumbel_softmax(logits, 0.5) @ torch.arange(3.0, dtype=logits.dtype), 0.3))


class Noisy(Program):
    """Draws before the first site, in a loop, between sites, hidden from handlers, and after the last one."""

    def forward(self):
        shift = torch.rand(())
        z = pyro.sample("z", dist.Normal(self.weight + shift, 1.0))
        for index in range(3):
            z = z + 0.1 * torch.randn(())
            z = pyro.sample(f"z{index}", dist.Normal(z, self.weight.exp()))
        with poutine.block():
            z = z + pyro.sample("hidden", dist.Laplace(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("y", dist.Normal(z + torch.poisson(torch.tensor(3.0)), 1.0))
        return torch.randn(2)


class Process(Program):
    """Pyro's Bernoulli likelihood draws the function's value by calling a distribution."""

    def __init__(self, start=0.0):
        super().__init__(start)
        self.likelihood = gp.likelihoods.Binary()

    def forward(self):
        f_loc = self.weight + torch.linspace(-1, 1, ROWS)
        with pyro.plate("rows", ROWS):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            self.likelihood(f_loc, torch.ones(ROWS), y=None)


PROGRAMS = {program.__name__: program for program in (ByHand, Called, DropsOut, Relaxed, Noisy, Process)}


def targets_of(program):
    return ["y", "x"] if program is DropsOut else ["y"]


class Net(nn.Module):
    """A decoder with dropout in its network."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self):
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.net(z).squeeze(-1), 0.5))
