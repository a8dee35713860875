"""Latent variable model whose prior is an autoregressive flow of a Gaussian.

Exercises a learned ``TransformedDistribution`` as a latent, with gradients through the transform of shared noise.
"""

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from torch import nn

from tests.programs import Program, trained


def make(width):
    flow = T.affine_autoregressive(2, hidden_dims=[width])
    decoder = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 5))

    def model(rows):
        pyro.module("flow", flow)
        pyro.module("decoder", decoder)
        prior = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow])
        with pyro.plate("rows", rows):
            z = pyro.sample("z", prior)
            return pyro.sample("x", dist.StudentT(4.0, decoder(z), 0.5).to_event(1))

    return model


def program():
    return Program(trained(make(16), 2), make(6), (64,), {"targets": ["x"]})
