"""Factor analysis as a teacher, with noise of every column its own; the student is probabilistic PCA, with one for all.

Exercises ``pyro.param`` matrices, a data plate subsampled by ``pyro.subsample``, and student and teacher of unequal
parameters.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.programs import Program, trained

COLUMNS, FACTORS = 6, 2


def make(noises):
    def model(data):
        loadings = pyro.param("loadings", lambda: torch.randn(FACTORS, COLUMNS))
        mean = pyro.param("mean", lambda: torch.randn(COLUMNS))
        noise = pyro.param("noise", lambda: 0.5 + torch.rand(noises), constraint=constraints.positive)
        with pyro.plate("rows", len(data), subsample_size=50):
            batch = pyro.subsample(data, event_dim=1)
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([FACTORS]).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings + mean, noise).to_event(1), obs=batch)

    return model


def program():
    data = torch.randn(200, COLUMNS)
    return Program(trained(make(COLUMNS), data), make(1), (data,))
