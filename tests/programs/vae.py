"""Variational autoencoder: Gaussian code, Bernoulli pixels.

Exercises an ``nn.Module`` with a ``model`` method, ``pyro.module``, a data plate, ``to_event`` and ``obs=``.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from tests.programs import Program, trained

PIXELS, CODE = 20, 3


class VAE(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(CODE, width), nn.Softplus(), nn.Linear(width, PIXELS), nn.Sigmoid())

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(x.shape[0], CODE)
            z = pyro.sample("latent", dist.Normal(z_loc, torch.ones_like(z_loc)).to_event(1))
            probs = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(probs).to_event(1), obs=x)
            return probs


def program():
    x = dist.Bernoulli(0.5).sample((32, PIXELS))
    return Program(trained(VAE(24).model, x), VAE(6).model, (x,))
