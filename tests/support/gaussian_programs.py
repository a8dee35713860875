"""A Gaussian latent and a Gaussian target in one plate."""

import pyro
import pyro.distributions as dist

__all__ = ["gaussian"]


def gaussian(loc, scale=0.5, rows=10):
    """z ~ N(loc, 1) and x ~ N(z, scale)."""

    def program():
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, scale))

    return program
