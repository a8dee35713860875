"""Programs made from distributions by site, and the check that a loss refuses a pair of them."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import errors
from tests.support.losses import SurrogateKD


def make(**sites):
    """A program with the given sites: name -> distribution, or function without arguments that makes one."""

    def program(*args):
        for name, fn in sites.items():
            pyro.sample(name, fn() if callable(fn) and not isinstance(fn, torch.distributions.Distribution) else fn)

    return program


def normal(loc=0.0, scale=1.0):
    return dist.Normal(torch.as_tensor(loc), torch.as_tensor(scale))


def raises(kind, *parts, loss=None, student=None, teacher=None):
    loss = loss or SurrogateKD(["x"])
    with pytest.raises(kind) as caught:
        loss.terms(student, teacher)
    assert isinstance(caught.value, errors.PyroKDError)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
