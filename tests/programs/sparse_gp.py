"""Gaussian process regression with inducing points, by ``pyro.contrib.gp``; the student has fewer of them.

Exercises a ready-made ``Parameterized`` module with its kernel, and ``LowRankMultivariateNormal`` as target.
"""

import torch
from pyro.contrib import gp

from tests.programs import Program, trained


def make(points, lengthscale):
    x = torch.linspace(0, 5, 30)
    y = torch.sin(2 * x)
    kernel = gp.kernels.RBF(input_dim=1, lengthscale=torch.tensor(lengthscale))
    inducing = torch.linspace(0.2, 4.8, points) + 0.1 * torch.rand(points)
    return gp.models.SparseGPRegression(x, y, kernel, Xu=inducing, noise=torch.tensor(0.1), jitter=1e-4).model


def program():
    return Program(trained(make(10, 1.0)), make(4, 2.0))
