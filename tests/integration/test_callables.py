"""A program may be any callable (closure, method, module, partial, recursion), and takes arguments of any type.

Each factory makes a program y ~ N(loc sum(x), 1), called with x.
"""

import functools
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import freeze
from tests.support.inputs import X
from tests.support.loss_options import both, particles


def linear(x, loc):
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(loc * x.sum(-1), 1.0))


class Holder:
    loc = None

    def __init__(self, loc):
        self.value = loc

    def model(self, x):
        return linear(x, self.value)

    def __call__(self, x):
        return linear(x, self.value)

    @classmethod
    def by_class(cls, x):
        return linear(x, cls.loc)

    @staticmethod
    def by_nothing(x, loc):
        return linear(x, loc)


class HolderModule(nn.Module):
    def __init__(self, loc):
        super().__init__()
        self.loc = nn.Parameter(loc.detach().clone())

    def forward(self, x):
        return linear(x, self.loc)

    def model(self, x):
        return linear(x, self.loc)


def a_closure(loc):
    def model(x):
        return linear(x, loc)

    return model


def a_class_method(loc):
    return type("Fixed", (Holder,), {"loc": loc}).by_class


def nested_functions(loc):
    def model(x):
        def inner():
            return linear(x, loc)

        return inner()

    return model


def a_recursion(loc):
    def model(x, depth=3):
        return model(x, depth - 1) if depth else linear(x, loc)

    return model


def a_decorated_function(loc):
    @functools.wraps(linear)
    def model(x):
        return linear(x, loc)

    return model


CALLABLES = {
    "closure": a_closure,
    "lambda": lambda loc: lambda x: linear(x, loc),
    "partial by keyword": lambda loc: functools.partial(linear, loc=loc),
    "partial of a partial": lambda loc: functools.partial(functools.partial(linear, loc=torch.tensor(9.0)), loc=loc),
    "default argument": lambda loc: lambda x, loc=loc: linear(x, loc),
    "bound method": lambda loc: Holder(loc).model,
    "class method": a_class_method,
    "static method in a partial": lambda loc: functools.partial(Holder.by_nothing, loc=loc),
    "callable object": Holder,
    "method of an object of functions": lambda loc: SimpleNamespace(model=lambda x: linear(x, loc)).model,
    "module": HolderModule,
    "method of a module": lambda loc: HolderModule(loc).model,
    "module in eval mode": lambda loc: HolderModule(loc).eval(),
    "sequential of one": lambda loc: nn.Sequential(HolderModule(loc)),
    "nested functions": nested_functions,
    "recursion": a_recursion,
    "decorated": a_decorated_function,
}


@pytest.mark.parametrize("teachers", CALLABLES)
@both
def test_every_kind_of_callable_as_teacher(loss, teachers):
    expected = float(X.sum(-1).square().sum() / 2)
    student, teacher = a_closure(torch.tensor(1.0)), CALLABLES[teachers](torch.tensor(0.0))
    assert loss(["y"]).loss(student, teacher, X) == pytest.approx(expected)
    assert loss(["y"]).loss(student, freeze(teacher), X) == pytest.approx(expected)


@pytest.mark.parametrize("students", CALLABLES)
@both
def test_every_kind_of_callable_as_student(loss, students):
    loc = torch.tensor(1.0, requires_grad=True)
    student = CALLABLES[students](loc)
    module = loss(["y"])(student, freeze(a_closure(torch.tensor(0.0))))
    (parameter,) = list(module.parameters()) or [loc]
    module(X).backward()
    assert float(parameter.grad) == pytest.approx(float(X.sum(-1).square().sum()))


@both
@particles
def test_arguments_of_any_kind(loss, options):
    """Positional, by keyword, with defaults, variable, and containers of tensors; shapes may change between the calls."""

    def program(loc):
        def model(x, *more, weights, shift=0.0, **named):
            total = x["a"] + sum(more) + weights[0] + named["bonus"]
            with pyro.plate("rows", len(total)):
                pyro.sample("y", dist.Normal(loc * total + shift, 1.0))

        return model

    objective = loss(["y"], **options)
    for rows in (2, 5):
        one = torch.ones(rows)
        value = objective.loss(program(1.0), program(0.0), {"a": one}, one, 2 * one, weights=(one,), bonus=3.0)
        assert value == pytest.approx(rows * 8.0**2 / 2)
