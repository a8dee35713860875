"""Normalising flow for a density: a rational spline and an affine coupling, the second variable conditional on the first.

Exercises ``TransformedDistribution`` with learned transforms, ``ConditionalTransformedDistribution``, and an observed site
that conditions another.
"""

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch

from tests.programs import Program, trained


def make(bins, width):
    base = dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1)
    marginal = T.spline(1, count_bins=bins)
    conditional = T.conditional_spline(1, context_dim=1, hidden_dims=[width], count_bins=bins)
    coupling = T.affine_coupling(2, hidden_dims=[width])
    x1_law = dist.TransformedDistribution(base, [marginal])
    x2_law = dist.ConditionalTransformedDistribution(base, [conditional])
    pair_law = dist.TransformedDistribution(dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1), [coupling])

    def model(data):
        for name, module in {"marginal": marginal, "conditional": conditional, "coupling": coupling}.items():
            pyro.module(name, module)
        with pyro.plate("data", len(data)):
            x1 = pyro.sample("x1", x1_law, obs=data[:, :1])
            pyro.sample("x2", x2_law.condition(x1), obs=data[:, 1:2])
            pyro.sample("x34", pair_law, obs=data[:, 2:])

    return model


def program():
    data = torch.randn(64, 4)
    return Program(trained(make(8, 16), data), make(4, 6), (data,))
