"""Programs of the tests of the losses: a chain of continuous variables, and a decoder with a network."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn


def chain(weight, scale=0.5):
    """z1 -> z2 -> x, continuous, with parameters given as tensors."""

    def program(n=50):
        with pyro.plate("rows", n):
            z1 = pyro.sample("z1", dist.Normal(weight[0], 1.0))
            z2 = pyro.sample("z2", dist.Normal(torch.tanh(weight[1] * z1), weight[2].exp()))
            return pyro.sample("x", dist.Normal(weight[3] * z2, scale))

    return program


def vector_program(width, name="decoder"):
    net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 3))

    def program(n=32):
        pyro.module(name, net)
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1))

    return program, net
