"""Gaussian process latent variable model by ``pyro.contrib.gp``: several outputs over inputs that are unknown.

Exercises a ``PyroSample`` set on a ready-made module, and its kernel with one length scale a dimension.
"""

import pyro.distributions as dist
import torch
from pyro.contrib import gp
from pyro.nn import PyroSample

from tests.programs import Program, trained

ROWS, OUTPUTS = 20, 4


def make(points, y):
    guess = torch.stack([torch.linspace(-2, 2, ROWS), torch.linspace(1, -1, ROWS).square()], -1)
    kernel = gp.kernels.RBF(input_dim=2, lengthscale=0.5 + torch.rand(2))
    module = gp.models.SparseGPRegression(
        guess, y, kernel, Xu=torch.randn(points, 2), noise=0.1 + 0.2 * torch.rand(()), jitter=1e-4
    )
    module.X = PyroSample(dist.Normal(guess, 0.1).to_event())
    return module.model


def program():
    y = torch.randn(OUTPUTS, ROWS)
    return Program(trained(make(10, y)), make(5, y))
