"""Sparse Gamma deep exponential family: three layers of Gamma units with Gamma weights, over Poisson counts.

Exercises long chains of Gamma latents with small shapes, a subsampled data plate, and one parameter for each prior.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.programs import Program, trained

WIDTHS = {"top": 4, "mid": 3, "bottom": 6}
PIXELS = 8


def positive(name, low, high):
    return pyro.param(name, lambda: low + (high - low) * torch.rand(()), constraint=constraints.positive)


def weights(name, rows, columns):
    shape, mean = positive(f"shape_w_{name}", 0.3, 1.0), positive(f"mean_w_{name}", 0.3, 0.8)
    return pyro.sample(f"w_{name}", dist.Gamma(shape, shape / mean).expand([rows, columns]).to_event(2))


def model(x):
    w_top = weights("top", WIDTHS["top"], WIDTHS["mid"])
    w_mid = weights("mid", WIDTHS["mid"], WIDTHS["bottom"])
    w_bottom = weights("bottom", WIDTHS["bottom"], PIXELS)
    alpha = positive("alpha_z", 0.5, 1.5)
    with pyro.plate("data", len(x), subsample_size=10):
        z_top = pyro.sample("z_top", dist.Gamma(alpha, alpha).expand([WIDTHS["top"]]).to_event(1))
        z_mid = pyro.sample("z_mid", dist.Gamma(alpha, alpha / (z_top @ w_top + 0.1)).to_event(1))
        z_bottom = pyro.sample("z_bottom", dist.Gamma(alpha, alpha / (z_mid @ w_mid + 0.1)).to_event(1))
        pyro.sample("obs", dist.Poisson(z_bottom @ w_bottom + 0.1).to_event(1), obs=pyro.subsample(x, event_dim=1))


def program():
    x = dist.Poisson(2.0).sample((40, PIXELS))
    return Program(trained(model, x), model, (x,))
