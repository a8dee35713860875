"""Whatever changes in a student's modules and attributes, a captured loss is the eager one."""

import dataclasses
import functools
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.testing import assert_close

from tests.support.captured import pair, values

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the student draws these outside"),  # dropout in train mode
    pytest.mark.filterwarnings("ignore:(these are drawn outside of sample sites|a program draws from)"),
]

FACTOR = 2.0
own = sys.modules[__name__]


def scaled(loc):
    return loc * FACTOR


@dataclasses.dataclass
class Settings:
    factor: float = 2.0


@dataclasses.dataclass(frozen=True)
class Fixed:
    factor: float = 2.0


class Slotted:
    __slots__ = ("factor",)

    def __init__(self):
        self.factor = 2.0


class Net(nn.Module):
    """A student with every kind of attribute that its loss depends on."""

    shared = 2.0

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.ones(3))
        self.register_parameter("shift", None)
        self.register_buffer("offset", None)
        self.number, self.items, self.table = 2.0, [2.0], {"factor": 2.0}
        self.settings, self.fixed, self.slotted = Settings(), Fixed(), Slotted()
        self.array, self.tensor, self.chosen = np.array([2.0]), torch.tensor(2.0), {"squared"}
        self.norm, self.dropout, self.activation = nn.BatchNorm1d(3), nn.Dropout(0.25), nn.LeakyReLU(0.25)
        nn.init.constant_(self.norm.weight, 1.5)
        self.weights = [nn.Parameter(torch.tensor(2.0))]
        self.function = scaled
        self.bound = functools.partial(torch.mul, torch.tensor(2.0))
        self.double()

    def forward(self, x):
        loc = self.bound(self.function(self.loc))
        factors = [self.number, self.items[0], self.table["factor"], self.settings.factor, self.fixed.factor]
        for factor in [*factors, self.slotted.factor, float(self.array[0]), self.tensor, self.shared, self.weights[0]]:
            loc = loc * factor
        if self.shift is not None:
            loc = loc + self.shift
        if self.offset is not None:
            loc = loc + self.offset
        if "squared" in self.chosen:
            loc = loc.square()
        loc = self.activation(self.dropout(loc * self.norm(x)))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(loc, 100.0).to_event(1))


def change_setting(net):
    net.settings.factor = 3.0


def change_class(net, monkeypatch):
    monkeypatch.setattr(Net, "shared", 3.0)


def change_global(net, monkeypatch):
    monkeypatch.setattr(own, "FACTOR", 3.0)


def change_forward(net, monkeypatch):
    forward = Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, x: forward(self, x.square()))


def change_array(net):
    net.array[0] = 3.0


CHANGES = {
    "a number": lambda net: setattr(net, "number", 3.0),
    "a list's item": lambda net: net.items.__setitem__(0, 3.0),
    "a list": lambda net: setattr(net, "items", [3.0]),
    "a dictionary's item": lambda net: net.table.update(factor=3.0),
    "a dataclass": change_setting,
    "another dataclass": lambda net: setattr(net, "settings", Settings(3.0)),
    "another frozen dataclass": lambda net: setattr(net, "fixed", Fixed(3.0)),
    "a slot": lambda net: setattr(net.slotted, "factor", 3.0),
    "an array's item": change_array,
    "an array": lambda net: setattr(net, "array", np.array([3.0])),
    "a tensor that is an attribute": lambda net: setattr(net, "tensor", torch.tensor(3.0)),
    "a set": lambda net: net.chosen.clear(),
    "an attribute over a class's": lambda net: setattr(net, "shared", 3.0),
    "a class's attribute": change_class,
    "a global": change_global,
    "a method": change_forward,
    "a function": lambda net: setattr(net, "function", torch.neg),
    "a partial": lambda net: setattr(net, "bound", functools.partial(torch.mul, torch.tensor(3.0))),
    "Dropout.p": lambda net: setattr(net.dropout, "p", 0.75),
    "BatchNorm.eps": lambda net: setattr(net.norm, "eps", 0.5),
    "LeakyReLU.negative_slope": lambda net: setattr(net.activation, "negative_slope", 0.5),
    "a parameter for none": lambda net: setattr(net, "shift", nn.Parameter(torch.ones(3).double())),
    "a buffer for none": lambda net: setattr(net, "offset", torch.ones(3)),
    "no parameter any more": lambda net: setattr(net.norm, "weight", None),
    "a parameter": lambda net: setattr(net, "loc", nn.Parameter(torch.tensor([3.0, 2.0, 1.0]).double())),
    "a parameter in a list": lambda net: net.weights.__setitem__(0, nn.Parameter(torch.tensor(3.0))),
    "a module": lambda net: setattr(net, "activation", nn.Tanh()),
    "a module's class": lambda net: setattr(net.activation, "__class__", nn.Tanh),
    "a forward hook": lambda net: net.norm.register_forward_hook(lambda module, args, output: output + 1),
    "a forward pre-hook": lambda net: net.activation.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "a parametrisation": lambda net: nn.utils.parametrize.register_parametrization(net, "loc", nn.Softplus()),
    "eval mode": lambda net: net.eval(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_the_student_is_seen(change, monkeypatch):
    net, x = Net(), torch.randn(8, 3, dtype=torch.float64)
    modules = pair(net)
    before = values(modules, x)
    assert_close(*before)
    if change.__code__.co_argcount == 2:
        change(net, monkeypatch)
    else:
        change(net)
    after = values(modules, x)
    assert_close(*after)
    assert not torch.isclose(after[0], before[0], rtol=1e-5), "a change that matters"
    assert_close(*values(modules, x))


def test_a_changed_momentum_of_batch_norm_is_seen():
    net, x, averages = Net(), torch.randn(8, 3, dtype=torch.float64), []
    for module in pair(net):
        net.norm.reset_running_stats()
        for momentum in (0.1, 0.5, None):
            net.norm.momentum = momentum
            module(x)
        averages.append(net.norm.running_mean.clone())
    assert_close(*averages)


def test_equal_objects_need_no_new_graph():
    net, x = Net(), torch.randn(8, 3, dtype=torch.float64)
    _, captured = modules = pair(net)
    values(modules, x)
    for number in (1, 2):
        net.items, net.table, net.settings, net.number = [2.0], {"factor": 2.0}, Settings(), float(str(2.0 + 0 * number))
        assert_close(*values(modules, x))
    assert captured.loss._pairs._pairs[0].captured._capture.num_graphs == 1
    net.settings.factor = 3.0
    assert_close(*values(modules, x))


def test_a_number_that_changes_in_each_step_ends_captures_with_one_warning():
    """There are as many graphs as allowed, and then none; the loss is right all the time."""
    net, x, warned = Net(), torch.randn(8, 3, dtype=torch.float64), []
    modules = pair(net, max_graphs=2)
    for step in range(40):
        net.number = 1.0 + step / 10
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_close(*values(modules, x))
        warned += [text for text in map(str, (warning.message for warning in caught)) if "graph" in text]
    assert len(warned) == 1
    assert "2 graphs already" in warned[0]


def test_a_hook_on_all_modules_is_seen():
    modules, x = pair(Net()), torch.randn(8, 3, dtype=torch.float64)
    before = values(modules, x)
    hook = register_module_forward_hook(
        lambda module, args, output: 2 * output if isinstance(module, nn.LeakyReLU) else None
    )
    try:
        after = values(modules, x)
    finally:
        hook.remove()
    assert_close(*before)
    assert_close(*after)
    assert not torch.isclose(before[0], after[0])
