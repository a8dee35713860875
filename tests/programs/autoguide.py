"""An automatic guide of full covariance, as a trained posterior, into one of diagonal covariance.

Exercises ``AutoMultivariateNormal`` and ``AutoDiagonalNormal`` as programs, ``site_map`` between their latent sites, and a
target that is a latent of the model.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, init_to_sample

from tests.programs import Program, trained


def regression(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ slope, noise), obs=y)


def posterior(family, *args):
    guide = family(regression, init_loc_fn=init_to_sample, init_scale=0.5)
    guide(*args)
    return guide


def program():
    args = torch.randn(20, 2), torch.randn(20)
    teacher = posterior(AutoMultivariateNormal, *args)
    with torch.no_grad():
        teacher.scale_tril_unconstrained.add_(0.3 * torch.randn(3, 3).tril(-1))
    options = {
        "targets": ["_AutoMultivariateNormal_latent"],
        "site_map": {"_AutoDiagonalNormal_latent": "_AutoMultivariateNormal_latent"},
    }
    return Program(trained(teacher, *args), posterior(AutoDiagonalNormal, *args), args, options, steps=60, lr=0.05)
