"""Train, be killed by SIGKILL at random moments, go on from the last checkpoint, and end as if nothing had happened.

    python -m tests.support.killed_training FOLDER --kills 20 --seed 0

Each life of the training run is a forked process, so that a kill costs no import. Prints one line of JSON.
"""

import argparse
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_kd import Distiller, freeze
from pyro_kd.training import Checkpoints, DistillationObjective, Validation, linear
from tests.support.losses import SurrogateKD

STEPS = 60


class Student(nn.Module):
    """Everything that has a state: parameters, a buffer, dropout, pyro.param with a constraint."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 3))

    def forward(self, x):
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        pyro.module("student", self)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x, scale).to_event(1))
            pyro.sample("y", dist.Normal(self.net(z), 1.0).to_event(1))


class Noisy(TensorDataset):
    """Rows with noise from NumPy and Python on top, as augmentation has it."""

    def __getitem__(self, index):
        return (super().__getitem__(index)[0] + float(np.random.randn()) + random.random(),)


def train(folder, steps=STEPS, resume=True, callbacks=(), pyro_optimiser=False, reuse=None):
    """One life. Returns the distiller."""
    pyro.clear_param_store()
    torch.manual_seed(7)
    teacher, student = Student(8), Student(3)
    frozen = freeze(teacher)
    data = torch.randn(50, 2)
    frozen(data)
    pyro.clear_param_store()
    if pyro_optimiser:
        optim, scheduler = (
            pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.99}),
            None,
        )
    else:
        optim = lambda params: torch.optim.AdamW(params, lr=1e-2)  # noqa: E731
        scheduler = lambda optim: torch.optim.lr_scheduler.MultiStepLR(optim, [20, 40], gamma=0.5)  # noqa: E731
    distiller = Distiller(
        student,
        frozen,
        optim,
        SurrogateKD(["y"]),
        latent_weight=linear(0.0, 1.0, 30),
        objectives={"again": DistillationObjective(SurrogateKD(["y"], num_particles=2), student, frozen, weight=0.5)},
        scheduler=scheduler,
        clip_norm=1.0,
        reuse=reuse,
        accumulate=2,
        log_every=10,
    )
    loader = DataLoader(Noisy(data), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(3))
    distiller.fit(
        batches=loader,
        steps=steps,
        seed=11,
        checkpoints=Checkpoints(folder, every=4),
        resume=resume,
        validation=Validation([data], every=7, restore_best=False),
        return_on_interrupt=True,
        progress=False,
        callbacks=callbacks,
    )
    return distiller


def result(distiller):
    """Everything that must be the same, as plain numbers."""
    history = {name: column for name, column in distiller.history.items() if name != "seconds"}
    tensors = {name: tensor.double().flatten().tolist() for name, tensor in distiller._stepper.state.tensors.items()}
    return json.dumps({"tensors": tensors, "history": history, "next": torch.rand(3).tolist(), "numpy": np.random.rand()})


def live(folder, out):
    """A life in a process of its own; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            out.with_suffix(".part").write_text(result(train(folder)))
            out.with_suffix(".part").rename(out)
        finally:
            os._exit(0 if out.exists() else 1)
    return child


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    torch.set_num_threads(1)
    chance = random.Random(options.seed)

    begin = time.perf_counter()
    child = live(options.folder / "undisturbed", options.folder / "undisturbed.json")
    assert os.waitpid(child, 0)[1] == 0
    life = time.perf_counter() - begin
    kills = runs = 0
    different = []
    while kills < options.kills:
        out = options.folder / f"run-{runs}.json"
        while not out.exists():
            child = live(options.folder / f"run-{runs}", out)
            if kills < options.kills:
                time.sleep(chance.uniform(0.1, 0.7) * life)
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status):
                kills += 1
            else:
                assert status == 0, f"a life ended with {status}"
        if out.read_text() != (options.folder / "undisturbed.json").read_text():
            different.append(runs)
        shutil.rmtree(options.folder / f"run-{runs}")
        runs += 1
    print(json.dumps({"kills": kills, "runs": runs, "different": different, "seconds_undisturbed": life}))


if __name__ == "__main__":
    main()
