"""Small programs, optimisers and fits, for tests of the training loop."""

import json

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_kd import Distiller
from pyro_kd.training import Checkpoints
from pyro_kd.training.checkpoints import _checksum
from tests.support.losses import SurrogateKD


def sgd(params):
    return torch.optim.SGD(params, lr=0.01)


def fast_sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def adam(params):
    return torch.optim.Adam(params, lr=0.05)


def gaussian(loc):
    """A teacher: rows from a normal distribution of mean ``loc``. The loss of a student at mu is rows * (mu - loc)^2 / 2."""

    def teacher(rows=1):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(torch.as_tensor(loc), 1.0))

    return teacher


def point(loc):
    """The same teacher without a plate, whatever its arguments."""
    return lambda *args, **kwargs: pyro.sample("x", dist.Normal(torch.as_tensor(loc), 1.0))


def mean(rows=1):
    """A student with one parameter mu, which starts at 0."""
    with pyro.plate("rows", rows):
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0))


def decoder(seed, width=4):
    """A decoder of two latents with one hidden layer, of which ``net`` is the network."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))

    def model(rows):
        pyro.module("decoder", net)
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z).squeeze(-1), 0.5))

    model.net = net
    return model


def scale(rows=1):
    """A student whose scale nothing keeps positive; ``dist.Normal`` has a finite KL there."""
    with pyro.plate("rows", rows):
        pyro.sample("x", dist.Normal(0.0, pyro.param("scale", torch.tensor(0.5))))


def new_distiller():
    """A Distiller of one parameter, in an empty parameter store."""
    pyro.clear_param_store()
    return Distiller(mean, gaussian(3.0), sgd, SurrogateKD(["x"]))


def quiet_fit(trainer, *args, **options):
    """A fit without a progress bar."""
    return trainer.fit(*args, progress=False, **options)


def fit(folder=None, steps=4, *, teacher=None, student=mean, optim=adam, loss=None, rows=10, options=None, **settings):
    """A new Distiller in an empty parameter store, after a fit."""
    pyro.clear_param_store()
    distiller = Distiller(student, teacher or gaussian(3.0), optim, loss or SurrogateKD(["x"]), **(options or {}))
    data = {} if "batches" in settings else {"rows": rows}
    checkpoints = None if folder is None else Checkpoints(folder, every=2)
    distiller.fit(**data, steps=steps, checkpoints=checkpoints, progress=False, **settings)
    return distiller


def names(folder):
    """What lies in a folder, without hidden files."""
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def header_of(checkpoint):
    """What the JSON file of a checkpoint holds."""
    return json.loads((checkpoint / "checkpoint.json").read_text())


def rewrite(checkpoint, header, *, sealed):
    """Replace the JSON file of a checkpoint, with a checksum that fits it or with the one that it has."""
    if sealed:
        header["crc32"] = _checksum(header)
    (checkpoint / "checkpoint.json").write_text(json.dumps(header))


def snapshot(folder):
    """Every file below a folder with its contents, and every folder with None."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
