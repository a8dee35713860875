"""Losses without and with capture, side by side, between programs small enough to run in milliseconds."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_kd import freeze
from tests.support.losses import SurrogateKD

MARKS = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the student draws these outside"),  # dropout in train mode
    pytest.mark.filterwarnings("ignore:(these are drawn outside of sample sites|a program draws from)"),
    # of Pyro's sparse Gaussian processes
    pytest.mark.filterwarnings("ignore:pyro.factor 'trace_term' has no part in the loss"),
]
"""Of every test of a capture."""


class Net(nn.Module):
    """inputs -> z -> x, with what modules have: batch norm, dropout, buffers. Counts its runs."""

    def __init__(self, seed, dropout=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 2, bias=False)  # a bias before batch norm has rounding for a gradient
        self.norm, self.dropout = nn.BatchNorm1d(2), nn.Dropout(dropout)
        self.last = nn.Linear(2, 1)
        self.runs = 0
        self.double()

    def forward(self, inputs):
        self.runs += 1
        with pyro.plate("rows", len(inputs)):
            z = pyro.sample("z", dist.Normal(self.dropout(self.norm(self.first(inputs))), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.last(z).squeeze(-1), 0.5))


class Registered(Net):
    """The same, in Pyro's parameter store."""

    def forward(self, inputs):
        pyro.module("net", self)
        return super().forward(inputs)


class Pair:
    """A student and a teacher, with their loss twice: eager and captured."""

    def __init__(self, student=None, teacher=None, loss=None, **options):
        self.student = Net(1) if student is None else student
        self.teacher = freeze(Net(0)) if teacher is None else teacher
        loss = SurrogateKD(["x"]) if loss is None else loss
        self.eager, self.captured = loss(self.student, self.teacher), loss(self.student, self.teacher)
        self.captured.compile(backend=None, **options)

    def agree(self, *args):
        """Assert equal losses and gradients. Returns them."""
        captured = outcome(self.captured, *args)
        assert_close(captured, outcome(self.eager, *args))
        return captured


def outcome(module, *args, seed=3):
    """The loss, and the gradient of each of the student's parameters."""
    torch.manual_seed(seed)
    module.zero_grad()
    loss = module(*args)
    loss.backward()
    return [loss.detach(), *(None if p.grad is None else p.grad.clone() for p in module.parameters())]


def rows(seed=0, number=5):
    return torch.randn(number, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def differ(mine, yours):
    return not torch.allclose(mine[0], yours[0], rtol=1e-4)


class Dropping(nn.Module):
    """Without latents, so that dropout is the only noise."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout = nn.Linear(3, 8).double(), nn.Dropout(0.5)

    def forward(self, inputs):
        with pyro.plate("rows", len(inputs)):
            pyro.sample("x", dist.Normal(self.dropout(self.layer(inputs)).sum(-1), 1.0))


class Means(nn.Module):
    """Two sites whose means are parameters, or functions of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(2, 1)), nn.Parameter(torch.ones(1, 2))
        self.register_buffer("calls", torch.zeros(()))

    def mean(self):
        return (self.a + self.b.view(2, 1)).squeeze(-1)

    def forward(self):
        pyro.sample("x", dist.Normal(self.mean(), 1.0).to_event(1))


def standard():
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def both(student, **options):
    """A loss without and with capture."""
    loss = SurrogateKD(["x"])
    captured = loss(student, standard)
    captured.compile(backend=None, **options)
    return loss(student, standard), captured


def teacher(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(torch.zeros(3), 100.0).to_event(1))


def pair(student, teacher=teacher, loss=None, **options):
    """A loss at y without and with capture."""
    loss = SurrogateKD(["y"]) if loss is None else loss
    eager, captured = loss(student, teacher), loss(student, teacher)
    captured.compile(backend=None, **options)
    return eager, captured


def values(modules, *args):
    """Their losses on the same noise and state."""
    found = []
    for module in modules:
        state = {name: value.clone() for name, value in module.state_dict().items()}
        pyro.set_rng_seed(1)
        found.append(module(*args).detach())
        module.load_state_dict(state, strict=False)  # what pyro.param makes in the call is not in it
    return found
