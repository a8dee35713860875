"""A teacher with a normal and a count at each row."""

import pyro
import pyro.distributions as dist

__all__ = ["teacher"]


def teacher(rows, shift=0.0):
    with pyro.plate("rows", rows):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        n = pyro.sample("n", dist.Poisson(z.exp()))
        pyro.sample("x", dist.Normal(z + 0.1 * n + shift, 0.5))
