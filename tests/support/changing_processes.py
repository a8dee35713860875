"""What changes in each of several processes while they train. Every function is called by all of them, and returns plain values."""

import warnings

import pyro
import pyro.distributions as dist
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_kd import Distiller, LocalKD, TeacherCache, cache_teacher, freeze
from pyro_kd.training import Callback, Checkpoints, best_start
from tests.support.shared_training import Decoder, adam, rank, sgd, state


class Each(Callback):
    """Calls a function with the student after its fifth step, in every process or in the first one."""

    def __init__(self, student, change, *, in_every_process=True):
        self.student, self.change, self.in_every_process = student, change, in_every_process

    def on_step(self, trainer, row):
        if trainer.num_steps == 5:
            self.change(self.student)


def replace(student):
    student.net[2] = nn.Linear(4, 2).double()


def unfreeze(student):
    student.net[0].weight.requires_grad_(True)


def scale(student):
    with torch.no_grad():
        student.net[0].weight.mul_(2.0)


CHANGES = {"replace": replace, "unfreeze": unfreeze, "scale": scale}


def changed(name, *, everywhere):
    """What is trained after a change, and what was warned of."""
    student = Decoder(2)
    student.net[0].weight.requires_grad_(name != "unfreeze")
    distiller = Distiller(student, freeze(Decoder(1)), adam, LocalKD(["x"]))
    callback = Each(student, CHANGES[name], in_every_process=everywhere)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distiller.fit(8, steps=9, seed=0, progress=False, callbacks=[callback])
    return state(distiller), [str(warning.message) for warning in caught]


class Features(nn.Module):
    """Random features that no seed makes equal, and buffers that each process writes to."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(rank())
        features = torch.randn(1, 4).double()
        if kind == "attribute":
            self.features = features
        else:
            self.register_buffer("features", features, persistent=False)
        self.register_buffer("mean", torch.zeros(()).double())
        self.net = nn.Linear(4, 1).double()

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * x.mean()  # another tensor in each step
            pyro.sample("y", dist.Normal(self.net((x @ self.features).cos()).squeeze(-1), 1.0))


def constants(kind):
    """The features and the mean after some steps on rows of each process's own, and what was warned of."""
    student = Features(kind)

    def teacher(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x[:, 0], 1.0))

    x = torch.full((4, 1), 1.0 + rank()).double()
    distiller = Distiller(student, teacher, sgd, LocalKD(["y"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distiller.fit(x, steps=3, progress=False)
    return student.features.tolist(), student.mean.item(), [str(warning.message) for warning in caught]


class Shifted(nn.Module):
    """Shifts its rows by what it has counted: each process counts otherwise."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.shift = nn.Parameter(torch.zeros(()).double())

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            if self.training:
                self.count += 1 + rank()
            pyro.sample("y", dist.Normal(self.shift * self.count, 1.0))


def shifted(folder, steps):
    """The count and the parameter after some steps in all, with a checkpoint every 2 steps; goes on from an earlier call."""

    def teacher(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x[:, 0], 1.0))

    student = Shifted()
    distiller = Distiller(student, teacher, sgd, LocalKD(["y"]))
    checkpoints = Checkpoints(folder, every=2)
    x = torch.ones(4, 1).double()
    distiller.fit(x, total_steps=steps, seed=0, checkpoints=checkpoints, resume=True, progress=False)
    return student.count.item(), student.shift.item()


def chosen():
    """The start that goes on, by the value that it began with, and the students after some more steps."""
    starts = []

    def make():
        student = Decoder(len(starts) + 2)
        starts.append(student)
        return Distiller(student, freeze(Decoder(1)), adam, LocalKD(["x"]))

    distiller = best_start(make, 8, starts=3, steps=2, judge=lambda trainer: (len(starts) - 1 + rank()) % 3, progress=False)
    own = next(index for index, student in enumerate(starts) if student is next(iter(distiller.objectives.values())).student)
    distiller.fit(8, steps=3, progress=False)
    return own, state(distiller)


def own_rows():
    """The numbers of rows that this process has trained on, where the user has shared them out."""
    seen = set()
    data = TensorDataset(torch.arange(8.0) + 8 * rank())

    def teacher(x):
        seen.update(x.tolist())
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x, 1.0))

    def student(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    distiller = Distiller(student, teacher, sgd, LocalKD(["y"]))
    distiller.fit(batches=DataLoader(data, 2, shuffle=True), steps=4, progress=False)
    return len(seen)


def unequal_lists():
    """A fit on more batches in the first process than in the other."""
    distiller = Distiller(Decoder(2), freeze(Decoder(1)), sgd, LocalKD(["x"]))
    distiller.fit(batches=[(8,)] * (2 - rank()), steps=2, progress=False)


def cached(folder):
    """A student on the draws of a cache that the first process has made, and what was warned of."""
    distributed.init_process_group("gloo")
    if rank() == 0:
        cache_teacher(freeze(Decoder(1)), 8, path=folder, batches=6, targets=["x"])
    distributed.barrier()
    cache = TeacherCache(folder)
    distiller = Distiller(Decoder(2), cache.teacher, sgd, LocalKD(["x"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distiller.fit(batches=cache.loader(num_workers=0), steps=3, progress=False)
    return state(distiller), [str(warning.message) for warning in caught]


def invalid_at_the_end():
    """A fit after whose last step a parameter of the second process is not valid."""
    student = Decoder(2)

    class Break(Callback):
        in_every_process = True

        def on_step(self, trainer, row):
            if rank() and trainer.num_steps == 2:
                with torch.no_grad():
                    student.net[0].weight[0, 0] = float("nan")

    distiller = Distiller(student, freeze(Decoder(1)), sgd, LocalKD(["x"]))
    distiller.fit(8, steps=2, progress=False, callbacks=[Break()])


def failing_judge():
    """The students after a choice of starts in which the judge of one process fails once."""
    made = []

    def make():
        made.append(Decoder(len(made) + 2))
        return Distiller(made[-1], freeze(Decoder(1)), adam, LocalKD(["x"]))

    def judge(trainer):
        if rank() and len(made) == 2:
            raise ValueError("no judgement")
        return float(len(made))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distiller = best_start(make, 8, starts=3, steps=2, judge=judge, progress=False)
    distiller.fit(8, steps=2, progress=False)
    return state(distiller), [str(warning.message) for warning in caught]


class Table(nn.Module):
    """A buffer that is as long as the longest batch so far, and an expanded one."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))
        self.register_buffer("table", torch.zeros(2), persistent=False)
        self.register_buffer("scale", torch.ones(1).expand(3), persistent=False)

    def forward(self, x):
        if len(x) > len(self.table):
            self.table = torch.arange(float(len(x)))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(self.loc + 0 * self.table[: len(x)], self.scale[0]))


def growing():
    """The parameter of a student whose buffers have other sizes in each process."""

    def teacher(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(3.0, 1.0))

    student = Table()
    batches = [torch.zeros(2 + rank() + number) for number in range(4)]
    Distiller(student, teacher, sgd, LocalKD(["y"])).fit(batches=[(x,) for x in batches], steps=4, progress=False)
    return student.loc.item()


def one_of_another_size():
    """A buffer of equal size in all processes, beside one of another size in each; no checkpoint holds them."""

    def teacher(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(3.0, 1.0))

    student = Table()
    student.table = torch.zeros(2 + rank())
    student.register_buffer("shift", torch.full((2,), float(rank())), persistent=False)
    Distiller(student, teacher, sgd, LocalKD(["y"])).fit(torch.zeros(2), steps=1, progress=False)
    return student.shift.tolist(), len(student.table)


class Counting(Decoder):
    """Counts rows in a buffer of whole numbers; one as batch norm has counts runs."""

    def __init__(self, seed):
        super().__init__(seed)
        self.register_buffer("num_batches", torch.tensor(0))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, rows):
        if self.training:
            self.num_batches += 1
            self.seen += rows * self.counts_rows
        super().forward(rows)


def counted(counts_rows):
    """What was warned of where a student counts its batches, or its rows too, of which each process has another number."""
    student = Counting(2)
    student.counts_rows = counts_rows
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Distiller(student, freeze(Decoder(1)), sgd, LocalKD(["x"])).fit(8 + rank(), steps=3, progress=False)
    return [str(warning.message) for warning in caught if "all processes" in str(warning.message)]


class ByName(Dataset):
    """Rows that are found by names, in a data set without a length."""

    def __getitem__(self, key):
        return torch.tensor(float(key))


def by_name():
    """How many batches a loader with a sampler of the user's has given."""
    seen = []

    def teacher(x):
        seen.append(len(x))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(3.0, 1.0))

    def student(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    loader = DataLoader(ByName(), 2, sampler=[str(number + 4 * rank()) for number in range(4)])
    Distiller(student, teacher, sgd, LocalKD(["y"])).fit(batches=loader, steps=2, progress=False)
    return set(seen)
