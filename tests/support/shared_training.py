"""What tests run in each of several processes. Every function is called by all of them, and returns plain values."""

import os
import warnings
from itertools import chain

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_kd import Distiller, freeze
from pyro_kd.noise.laws import NoiseLaw
from pyro_kd.training.cached_draws import _SharedSampler
from tests.support.killed_training import result, train
from tests.support.losses import SurrogateKD
from tests.support.training_callbacks import CtrlC, Stop

ROWS = 32


def rank():
    """The number of this process, before it is connected."""
    return int(os.environ.get("RANK", "0"))


class Decoder(nn.Module):
    """Two latents, one of them discrete, and a target, in a plate over rows: all of ``total``, or as many as there are."""

    def __init__(self, seed, width=4):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()

    def forward(self, rows, total=None):
        pyro.module("decoder", self)
        plate = pyro.plate("rows", rows) if total is None else pyro.plate("rows", total, subsample_size=rows)
        with plate as index:
            offset = 0.01 * index.double().unsqueeze(-1) if total else 0.0
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3).double()))
            pyro.sample("x", dist.Normal(self.net(torch.cat([z + offset, b.unsqueeze(-1)], -1)), 0.5).to_event(1))


def sgd(params):
    return torch.optim.SGD(params, lr=0.01)


def adam(params):
    return torch.optim.Adam(params, lr=0.01)


def state(distiller):
    """What is trained or kept, as numbers."""
    return {name: tensor.tolist() for name, tensor in distiller._stepper.state.tensors.items()}


class Drawn:
    """What was drawn in the last step of a fit: use it as a context."""

    def __init__(self, replace=None):
        self.draws, self._replace = [], replace

    def __enter__(self):
        self._sample, drawn = NoiseLaw.sample, self

        def sample(law, shape, dtype, device, generator=None):
            value = drawn._sample(law, shape, dtype, device, generator)
            if drawn._replace is not None:
                value = drawn._replace(len(drawn.draws), value)
            drawn.draws.append((law.name, value))
            return value

        NoiseLaw.sample = sample
        return self

    def __exit__(self, *_):
        NoiseLaw.sample = self._sample


def one_step(rows, total, replace=None, clip_norm=None):
    """One step of a Distiller: its gradients, and what it has drawn."""
    pyro.clear_param_store()
    teacher, student = freeze(Decoder(1)), Decoder(2)
    loss = SurrogateKD(["x"], latent_weight=0.1)
    distiller = Distiller(student, teacher, sgd, loss, weight=1.0 if total else 1 / rows, clip_norm=clip_norm)
    optimise = distiller._stepper.optimise
    with Drawn(replace) as drawn:

        def watched(*args, **options):
            drawn.draws.clear()
            return optimise(*args, **options)

        distiller._stepper.optimise = watched
        history = distiller.fit(rows, total, steps=1, seed=5, progress=False)
    gradients = {name: param.grad.tolist() for name, param in distiller.parameters.items()}
    return gradients, [(law, value.tolist()) for law, value in drawn.draws], history.losses[0]


def fifty_steps(compile):
    """Fifty steps of a Distiller: its student, its history, and its first draws."""
    pyro.clear_param_store()
    teacher, student = freeze(Decoder(1)), Decoder(2 + rank())  # that of the first process counts
    distiller = Distiller(student, teacher, adam, SurrogateKD(["x"]), clip_norm=1.0, log_every=10, compile=compile)
    with Drawn() as drawn:
        history = distiller.fit(8, steps=50, seed=3, progress=False)
    columns = {name: column for name, column in history.items() if name != "seconds"}
    return state(distiller), repr(columns), [value.tolist() for _, value in drawn.draws[:4]]


class Rows(nn.Module):
    """A student or teacher of one mean for rows of data."""

    def __init__(self, start):
        super().__init__()
        self.mean = nn.Parameter(torch.full((), float(start)))

    def forward(self, x):
        pyro.module("rows", self)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(self.mean + x, 1.0))


def rows_taken(epochs, batch_size, shuffle):
    """The rows of each epoch that this process takes of a plain DataLoader."""
    pyro.clear_param_store()
    taken = []

    class Taking(Rows):
        def forward(self, x):
            taken.append(x.tolist())
            super().forward(x)

    loader = DataLoader(TensorDataset(torch.arange(16.0)), batch_size=batch_size, shuffle=shuffle)
    teacher, student = freeze(Rows(1.0)), Taking(0.0)
    distiller = Distiller(student, teacher, sgd, SurrogateKD(["y"]), log_every=1000)
    per_epoch = 16 // batch_size // 2
    distiller._stepper.begin_fit = _forgetting(distiller._stepper.begin_fit, taken)
    distiller.fit(batches=loader, steps=epochs * per_epoch, seed=1, progress=False)
    return [list(chain(*taken[start : start + per_epoch])) for start in range(0, epochs * per_epoch, per_epoch)]


def _forgetting(function, found):
    def wrapped(*args):
        result = function(*args)
        found.clear()
        return result

    return wrapped


def life(folder, steps=60, interrupt=None, reuse=None):
    """A run of ``tests/support/killed_training.py`` in this process: its results, and its warnings."""
    callbacks = [] if interrupt is None else [CtrlC(interrupt)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distiller = train(folder, steps, callbacks=callbacks, reuse=reuse)
    return result(distiller), [str(warning.message) for warning in caught], distiller.num_steps


def stopped(folder, asks, steps, in_every_process):
    """A fit of 20 steps that the process of this number ends: the steps that were taken, the checkpoints, and the parameters."""
    pyro.clear_param_store()
    stop = Stop(steps)
    stop.in_every_process = in_every_process
    callbacks = [stop] if asks == rank() else []
    distiller = Distiller(Decoder(2), freeze(Decoder(1)), adam, SurrogateKD(["x"]))
    distiller.fit(8, steps=20, seed=3, progress=False, checkpoints=folder, resume=True, callbacks=callbacks)
    return distiller.num_steps, distiller.interrupted, sorted(path.name for path in folder.glob("step-*")), state(distiller)


class Parts:
    """Batches without a length: 3 in an epoch of the first process, 5 in one of the second."""

    def __iter__(self):
        return iter(torch.arange(3.0 + 2 * rank())[:, None] + 10 * rank())


def batches_of(kind):
    """Batches without a length, or eight in an order that the generator of a sampler makes, or the number of an epoch."""
    if kind == "parts":
        return Parts()
    data, count = torch.arange(8.0)[:, None], int(os.environ.get("WORLD_SIZE", "1"))
    sampler = _SharedSampler(8, True, 0) if kind == "generator" else DistributedSampler(data, count, rank())
    return DataLoader(data, batch_size=None, sampler=sampler)


def batches_taken(kind, folder, steps):
    """The batches of each step of a fit that resumes."""
    pyro.clear_param_store()
    distiller, taken = Distiller(Rows(0.0), freeze(Rows(1.0)), sgd, SurrogateKD(["y"])), []
    optimise = distiller._stepper.optimise

    def noting(calls, *wish):
        taken.append(calls[0][0][0].item())
        return optimise(calls, *wish)

    distiller._stepper.optimise = noting
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).* resumed from it")
        distiller.fit(batches=batches_of(kind), steps=steps, seed=1, progress=False, checkpoints=folder, resume=True)
    return taken


class Tolerant(Decoder):
    """Takes a further argument, and ignores it."""

    def forward(self, rows, more=None):
        super().forward(rows)


def reusing(steps, folder=None, arguments=False):
    """A fit with ``reuse``: seeds and uses of the draws of this process, and its student."""
    pyro.clear_param_store()
    distiller = Distiller(Tolerant(2), freeze(Tolerant(1)), adam, SurrogateKD(["x"]), reuse=2)
    call = (8, {1}) if arguments and rank() == 1 else (8,)  # a set, which no checkpoint can hold
    distiller.fit(*call, steps=steps, seed=3, progress=False, checkpoints=folder, resume=folder is not None)
    places = distiller.objectives["distillation"].pool.places
    return [(place.seed, place.uses) for place in places], state(distiller)
