"""Students that hold the same network in every way that Python allows, and their teacher."""

import functools
import types

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn

from pyro_kd import freeze
from tests.support.losses import SurrogateKD


def network(width=4):
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))


def draw(net, rows, scale=0.3):
    with pyro.plate("rows", rows):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(net(z).squeeze(-1), scale))


GLOBAL = network()


def with_global(rows):
    return draw(GLOBAL, rows)


class ByClass:
    net = network()

    def __call__(self, rows):
        return draw(self.net, rows)


class ByAttribute:
    def __init__(self, net):
        self.parts = {"nets": [net]}

    def model(self, rows):
        return draw(self.parts["nets"][0], rows)

    @property
    def as_lambda(self):
        return lambda rows: self.model(rows)


class ForwardUsesGlobal(nn.Module):
    def forward(self, rows):
        return with_global(rows)


HELPERS = types.ModuleType("helpers_of_the_user")
HELPERS.net = network()


def with_python_module(rows):
    return draw(HELPERS.net, rows)


def by_registered_closure(net):
    def model(rows):
        pyro.module("decoder", net)
        return draw(net, rows)

    return model


def by_default(net):
    def model(rows, net=net):
        return draw(net, rows)

    return model


def by_keyword(net):
    def model(rows, *, net=net):
        return draw(net, rows)

    return model


def by_decorator(net):
    def decorated(fn):
        @functools.wraps(fn)
        def wrapper(rows):
            return fn(net, rows)

        return wrapper

    return decorated(draw)


class Module(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, rows):
        return draw(self.net, rows)

    def model(self, rows):
        return draw(self.net, rows)


STUDENTS = {
    "pyro.module of a closure": by_registered_closure,
    "closure": lambda net: lambda rows: draw(net, rows),
    "closure of a helper": lambda net: (lambda helper: lambda rows: helper(rows))(lambda rows: draw(net, rows)),
    "default": by_default,
    "keyword default": by_keyword,
    "partial": lambda net: functools.partial(draw, net),
    "partial by keyword": lambda net: functools.partial(lambda rows, net: draw(net, rows), net=net),
    "handler": lambda net: poutine.scale(lambda rows: draw(net, rows), scale=1.0),
    "decorator": by_decorator,
    "object": lambda net: ByAttribute(net).model,
    "object in a lambda": lambda net: ByAttribute(net).as_lambda,
    "module": Module,
    "module's method": lambda net: Module(net).model,
    "module in a closure": lambda net: (lambda module: lambda rows: module(rows))(Module(net)),
    "method in a partial": lambda net: functools.partial(Module(net).model),
    "bound forward in a closure": lambda net: (lambda forward: lambda rows: draw(forward, rows))(net.forward),
}
ELSEWHERE = {
    "global": (with_global, GLOBAL),
    "class": (ByClass(), ByClass.net),
    "Python module": (with_python_module, HELPERS.net),
    "global in forward": (ForwardUsesGlobal(), GLOBAL),
}


def teacher():
    return freeze(by_registered_closure(network(16)))


def bound(student):
    frozen = teacher()
    pyro.clear_param_store()
    return SurrogateKD(["x"])(student, frozen)
