"""Programs of one parameter, for tests of the training loop."""

import pyro
import pyro.distributions as dist
import torch

from pyro_kd import Distiller, SurrogateKD


def sgd(params):
    return torch.optim.SGD(params, lr=0.01)


def adam(params):
    return torch.optim.Adam(params, lr=0.05)


def gaussian(loc):
    """A teacher: rows from a normal distribution of mean ``loc``."""

    def teacher(rows=1):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(torch.as_tensor(loc), 1.0))

    return teacher


def mean(rows=1):
    """A student with one parameter."""
    with pyro.plate("rows", rows):
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0))


def scale(rows=1):
    """A student whose scale nothing keeps positive; ``dist.Normal`` has a finite KL there."""
    with pyro.plate("rows", rows):
        pyro.sample("x", dist.Normal(0.0, pyro.param("scale", torch.tensor(0.5))))


def fit(folder=None, steps=4, *, teacher=None, student=mean, optim=adam, loss=None, rows=10, options=None, **settings):
    """A new Distiller in an empty parameter store, after a fit."""
    pyro.clear_param_store()
    distiller = Distiller(student, teacher or gaussian(3.0), optim, loss or SurrogateKD(["x"]), **(options or {}))
    data = {} if "batches" in settings else {"rows": rows}
    distiller.fit(**data, steps=steps, checkpoint=folder, checkpoint_every=2, progress=False, **settings)
    return distiller


def names(folder):
    """What lies in a folder, without hidden files."""
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
