"""Bayesian neural network whose weights have learned means and scales, into one of fewer hidden units.

Exercises ``PyroModule``, ``PyroSample`` of a function, ``PyroParam`` with constraints, and ``fresh`` for weights of other
shapes.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints

from tests.programs import Program, trained


class BayesianLinear(PyroModule[nn.Linear]):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        self.loc = PyroParam(torch.randn(outputs, inputs))
        self.scale = PyroParam(torch.full((outputs, inputs), 0.1), constraint=constraints.positive)
        self.weight = PyroSample(lambda layer: dist.Normal(layer.loc, layer.scale).to_event(2))


class Regression(PyroModule):
    def __init__(self, width):
        super().__init__()
        self.hidden = BayesianLinear(2, width)
        self.out = BayesianLinear(width, 1)
        self.shape = PyroParam(1 + torch.rand(()), constraint=constraints.positive)
        self.sigma = PyroSample(lambda module: dist.Gamma(5 * module.shape, 10.0))

    def forward(self, x, y=None):
        mean = self.out(self.hidden(x).tanh()).squeeze(-1)
        sigma = self.sigma
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def program():
    x, y = torch.randn(40, 2), torch.randn(40)
    options = {"fresh": ["hidden.weight", "out.weight"]}
    return Program(trained(Regression(10), x, y), Regression(3), (x, y), options)
