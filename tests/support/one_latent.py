"""A program with one latent variable, whose terms are worked out by hand: the teacher has loc = 0 and the student 1."""

import pyro
import pyro.distributions as dist
import torch

from pyro_kd import LocalKD
from tests.support.losses import SurrogateKD

TEACHER, STUDENT = torch.tensor(0.0), torch.tensor(1.0)


def program(loc, weight=None):
    """z ~ N(loc, 1), x ~ N(z + loc, 1), four rows; with a parameter if given."""

    def model():
        shift = loc if weight is None else loc + pyro.param("weight", weight)
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            return pyro.sample("x", dist.Normal(z + shift, 1.0))

    return model


PLAIN = {SurrogateKD: {"z": 2.0, "x": 8.0}, LocalKD: {"z": 2.0, "x": 2.0}}
