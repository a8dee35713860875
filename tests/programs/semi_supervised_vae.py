"""Semi-supervised variational autoencoder: digits, some with labels, share one decoder of class and style.

Exercises ``obs=None`` against ``obs=labels`` at one site, ``OneHotCategorical`` enumerated in parallel, an observed site
that is an input and no target, and two subsampled plates.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import constraints

from tests.programs import Program, trained

PIXELS, CLASSES, STYLE = 16, 4, 2


class SSVAE(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(STYLE + CLASSES, width), nn.Softplus(), nn.Linear(width, PIXELS))

    def model(self, unlabelled, labelled, labels):
        pyro.module("ss_vae", self)
        self.digits("unlabelled", unlabelled)
        self.digits("labelled", labelled, labels)

    def digits(self, name, xs, ys=None):
        prior = pyro.param("class_probs", lambda: torch.rand(CLASSES).softmax(-1), constraint=constraints.simplex)
        with pyro.plate(name, len(xs), subsample_size=20) as rows:
            z = pyro.sample(f"z_{name}", dist.Normal(torch.zeros(STYLE), 1.0).to_event(1))
            y = pyro.sample(
                f"y_{name}",
                dist.OneHotCategorical(prior),
                obs=None if ys is None else ys[rows],
                infer={"enumerate": "parallel"},
            )
            pyro.sample(f"x_{name}", dist.Bernoulli(logits=self.decoder(torch.cat([z, y], -1))).to_event(1), obs=xs[rows])


def program():
    args = (
        dist.Bernoulli(0.5).sample((50, PIXELS)),
        dist.Bernoulli(0.5).sample((30, PIXELS)),
        torch.eye(CLASSES)[torch.arange(30) % CLASSES],
    )
    options = {"targets": ["x_unlabelled", "x_labelled"]}
    return Program(trained(SSVAE(24).model, *args), SSVAE(8).model, args, options)
