"""Posterior of a Gaussian process as a distribution of its values at inducing points, with binary outcomes.

Exercises a ``MultivariateNormal`` latent with learned mean and Cholesky factor, kernel algebra in the model, and a Laplace
prior.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.programs import Program, trained

POINTS = 6


def rbf(a, b, lengthscale):
    return (-0.5 * (a[:, None] - b).square() / lengthscale**2).exp()


def model(x, y):
    inducing = pyro.param("inducing", lambda: torch.linspace(-2, 2, POINTS))
    lengthscale = pyro.param("lengthscale", lambda: 0.5 + torch.rand(()), constraint=constraints.positive)
    mean = pyro.param("mean", lambda: 2 * torch.randn(POINTS))
    factor = pyro.param("factor", lambda: 0.5 * torch.eye(POINTS), constraint=constraints.lower_cholesky)
    slope = pyro.param("slope", lambda: torch.randn(()))
    trend = pyro.sample("trend", dist.Laplace(slope, 0.5))
    u = pyro.sample("u", dist.MultivariateNormal(mean, scale_tril=factor))
    gram = rbf(inducing, inducing, lengthscale) + 1e-3 * torch.eye(POINTS)
    f = rbf(x, inducing, lengthscale) @ torch.linalg.solve(gram, u)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=f + trend * x), obs=y)


def program():
    args = (torch.linspace(-2, 2, 40), dist.Bernoulli(0.5).sample((40,)))
    return Program(trained(model, *args), model, args)
