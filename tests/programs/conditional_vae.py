"""Conditional variational autoencoder: fills in the missing half of an image, with a prior network p(z | x).

Exercises a program with inputs, a learned prior, a pretrained network that is shared, and ``.mask(...)`` that keeps the
given pixels out of the loss.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from tests.programs import Program, trained

PIXELS, CODE = 16, 4


class CVAE(nn.Module):
    def __init__(self, width, baseline):
        super().__init__()
        self.baseline = baseline
        self.prior = nn.Sequential(nn.Linear(2 * PIXELS, width), nn.ReLU(), nn.Linear(width, 2 * CODE))
        self.generation = nn.Sequential(nn.Linear(CODE, width), nn.ReLU(), nn.Linear(width, PIXELS))

    def model(self, xs, ys=None):
        pyro.module("prior_net", self.prior)
        pyro.module("generation_net", self.generation)
        missing = xs < 0
        with pyro.plate("data", len(xs)):
            guess = self.baseline(xs.clamp(min=0)).sigmoid()
            loc, log_scale = self.prior(torch.cat([xs, guess], -1)).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            logits = self.generation(z)
            pyro.sample("y", dist.Bernoulli(logits=logits).mask(missing).to_event(1), obs=ys)


def program():
    ys = dist.Bernoulli(0.5).sample((32, PIXELS))
    xs = ys.clone()
    xs[:, PIXELS // 2 :] = -1
    baseline = nn.Sequential(nn.Linear(PIXELS, 12), nn.ReLU(), nn.Linear(12, PIXELS))
    baseline.requires_grad_(False)  # it was trained before, and both use it as it is
    return Program(trained(CVAE(24, baseline).model, xs, ys), CVAE(10, baseline).model, (xs, ys))
