"""Runs in several processes that go wrong. Every function is called by all of them."""

import datetime
import os
import signal
import time

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_kd import Distiller, freeze
from pyro_kd.training import Callback, Checkpoints, DistillationObjective, Validation
from tests.support.losses import SurrogateKD
from tests.support.processes import Failure
from tests.support.shared_training import Rows, rank, sgd, state


def outcome(function, *args, **kwargs):
    """What a function returns, or how it fails."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return Failure(type(error).__name__, str(error))


def distiller_of(student=None, teacher=None, **options):
    """A Distiller of the mean of rows in an empty parameter store."""
    pyro.clear_param_store()
    teacher = freeze(Rows(1.0)) if teacher is None else teacher
    return Distiller(student or Rows(0.0), teacher, sgd, SurrogateKD(["y"]), **options)


def batches(count=4):
    """Batches that differ between processes."""
    return [torch.arange(4.0) + 10 * rank() + 100 * index for index in range(count)]


def differing():
    """How each kind of difference between processes ends."""
    number = rank()
    found = {"teacher": outcome(distiller_of(teacher=freeze(Rows(1.0 + number))).fit, batches=batches(), progress=False)}
    found["batches"] = outcome(distiller_of().fit, batches=batches(4 + number), steps=3, progress=False)
    found["steps"] = outcome(distiller_of().fit, batches=batches(), steps=3 + number, progress=False)
    found["option"] = outcome(distiller_of(accumulate=1 + number).fit, batches=batches(), steps=2, progress=False)

    def stored(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(pyro.param("theirs", torch.tensor(float(number))) + x, 1.0))

    found["stored"] = outcome(distiller_of(teacher=stored).fit, batches=batches(), progress=False)
    extra = Rows(0.0)
    if number:
        extra.bias = nn.Parameter(torch.zeros(3))
    found["parameter"] = outcome(distiller_of(extra).fit, batches=batches(), progress=False)
    sized = Rows(0.0)
    sized.register_buffer("seen", torch.zeros(4 + 2 * number, dtype=torch.long))
    found["buffer"] = outcome(distiller_of(sized).fit, batches=batches(), progress=False)
    found["step"] = outcome(distiller_of(teacher=freeze(Rows(1.0 + number))).step, torch.zeros(3))
    distiller = distiller_of()
    distiller.fit(batches=batches(), progress=False)  # the group is as good as new
    found["after"] = state(distiller)
    return found


class Raises(Callback):
    def __init__(self, at):
        self.at = at

    def on_step(self, trainer, row):
        if row["step"] == self.at:
            raise KeyError("the callback fails")


def failing(folder):
    """How a run ends in which one process fails, in each place where one can."""
    number = rank()
    found = {}

    def not_a_number():
        for index in range(9):
            yield torch.full((4,), float("nan") if number and index == 2 else 1.0)

    class Sharp(Rows):  # in which a NaN is no error of torch's validation
        def forward(self, x):
            pyro.module("rows", self)
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(self.mean * x.nan_to_num(), 1.0))
                pyro.sample("z", dist.Normal(self.mean * x, 1.0, validate_args=False))

    distiller = distiller_of(Sharp(0.0), freeze(Sharp(1.0)))
    found["loss"] = outcome(distiller.fit, batches=not_a_number(), steps=9, progress=False), distiller.num_steps
    found["exhausted"] = outcome(distiller_of().fit, batches=iter(batches(3 + 2 * number)), steps=5, progress=False)
    found["callback"] = outcome(distiller_of().fit, batches=batches(), steps=4, callbacks=[Raises(2)], progress=False)
    calls = []

    def judge():
        calls.append(1)
        if number and len(calls) == 2:
            raise ZeroDivisionError("the validation fails")
        return 1.0 + number

    found["validation"] = outcome(
        distiller_of().fit, batches=batches(), steps=4, validation=Validation(judge, every=1), progress=False
    )
    distiller = distiller_of()
    distiller.fit(batches=batches(), steps=2, validation=Validation(lambda: 1.0 + number, every=1), progress=False)
    found["mean"] = distiller.history["validation/loss"]
    place = os.path.join(folder, "file")
    if number == 0:
        with open(place, "w"):
            pass
    found["folder"] = outcome(distiller_of().fit, batches=batches(), checkpoints=place, progress=False)
    distiller = distiller_of()
    removed = Checkpoints(os.path.join(folder, "gone"), every=2)

    class Removes(Callback):
        def on_step(self, trainer, row):
            if row["step"] == 1:
                os.rename(removed.folder, os.path.join(folder, "elsewhere"))

    found["disk"] = outcome(
        distiller.fit, batches=batches(), steps=4, checkpoints=removed, callbacks=[Removes()], progress=False
    )
    distiller = distiller_of()
    distiller.fit(batches=batches(), progress=False)
    found["after"] = state(distiller)
    return found


class Branching(nn.Module):
    """A student whose two parameters are reached, or not, by what it is told."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.zeros(())) for _ in range(3))

    def forward(self, branch):
        pyro.module("branching", self)
        mean = {0: self.a, 1: self.b}[branch]
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(mean + torch.zeros(4), 1.0))


def unreached():
    """A step in which each process reaches a parameter of its own, and none reaches the third."""
    student = Branching()
    distiller = distiller_of(student, freeze(lambda branch: _fixed()))
    distiller.step(rank())
    return {name: None if p.grad is None else p.grad.item() for name, p in student.named_parameters()}


def _fixed():
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(torch.ones(4), 1.0))


def late_parameter():
    """One process makes a parameter in its second step."""
    calls = []

    def student(x):
        calls.append(1)
        mean = pyro.param("mean", torch.tensor(0.0))
        if rank() and len(calls) > 6:
            mean = mean + pyro.param("late", torch.tensor(0.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean + x, 1.0))

    return outcome(distiller_of(student).fit, batches=batches(), steps=9, progress=False)


def sparse():
    """A student with sparse gradients."""

    class Sparse(Rows):
        def __init__(self):
            super().__init__(0.0)
            self.table = nn.Embedding(8, 1, sparse=True)

        def forward(self, x):
            pyro.module("sparse", self)
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(self.table((x % 8).long()).squeeze(-1), 1.0))

    return outcome(distiller_of(Sparse()).fit, batches=batches(), steps=2, progress=False)


class Dies(Callback):
    in_every_process = True

    def __init__(self, *, hangs):
        self.hangs = hangs

    def on_step(self, trainer, row):
        if rank() == 1 and row["step"] == 2:
            if not self.hangs:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(6)


def dying(hangs):
    """One process is killed after two steps, or sleeps for longer than the group's timeout of 2 seconds."""
    if hangs:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
    begin = time.perf_counter()
    found = outcome(distiller_of().fit, batches=batches(), steps=9, callbacks=[Dies(hangs=hangs)], progress=False)
    return found, time.perf_counter() - begin


def several_objectives():
    """Losses and terms of a run with two objectives, of which one has weight 0 at first; and those of this process alone."""
    student, teacher = Rows(0.0), freeze(Rows(1.0 + 0.0))
    late = DistillationObjective(SurrogateKD(["y"]), student, teacher, weight=lambda step: float(step >= 1))
    distiller = distiller_of(student, teacher, objectives={"late": late}, log_every=1)
    distiller.fit(torch.zeros(4 + 4 * rank()), steps=2, progress=False)
    return {name: column for name, column in distiller.history.items() if name != "seconds"}


class Wide(nn.Module):
    """A student with parameters that fully_shard can divide."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 2)

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.net(z), 1.0).to_event(1))


def divided():
    """A student of FSDP2 in a Distiller; and in a loop of the user's, with the same sum of parameters in each process."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    teacher, student = freeze(Wide()), Wide()
    fully_shard(student, mesh=mesh)
    refused = outcome(Distiller(student, teacher, sgd, SurrogateKD(["y"])).fit, batches=batches(), progress=False)
    student = Wide()
    loss = SurrogateKD(["y"])(student, teacher)
    fully_shard(student, mesh=mesh)
    optimiser = sgd(list(student.parameters()))

    def loop():
        pyro.set_rng_seed(rank())
        for x in batches():
            optimiser.zero_grad()
            loss(x).backward()
            optimiser.step()
        student.reshard()
        return [param.full_tensor().tolist() for param in student.parameters()]

    return refused, outcome(loop)
