"""Handlers that do not change what a program computes do not change the loss."""

import functools

import pyro
import pytest
import torch
from pyro import poutine

from pyro_kd import freeze
from tests.support.loss_options import both
from tests.support.one_latent import PLAIN, STUDENT, TEACHER, program
from tests.support.runs import values_of


def traced(fn):
    return poutine.trace(fn)


def blocking_parameters(fn):
    return poutine.block(fn, hide_types=["param"])


def blocking_nothing(fn):
    return poutine.block(fn, hide=["nothing"])


def configured(fn):
    return poutine.infer_config(fn, config_fn=lambda site: {"enumerate": "parallel", "mine": 1})


def seeded(fn):
    return poutine.seed(fn, rng_seed=3)


def unconditioned(fn):
    return poutine.uncondition(fn)


def broadcasting(fn):
    return poutine.broadcast(fn)


def markov(fn):
    return poutine.markov(fn)


def conditioned_on_nothing(fn):
    return pyro.condition(fn, data={})


def substituting_nothing(fn):
    return poutine.substitute(fn, data={})


def lifted_from_nothing(fn):
    return poutine.lift(fn, prior={})


def done_to_nothing(fn):
    return pyro.do(fn, data={})


def equalizing_nothing(fn):
    return poutine.equalize(fn, sites=["nothing"])


def reparameterised_nowhere(fn):
    return poutine.reparam(fn, config={})


def escaping_never(fn):
    return poutine.escape(fn, escape_fn=lambda site: False)


def masked_by_true(fn):
    return poutine.mask(fn, mask=True)


def scaled_by_one(fn):
    return poutine.scale(fn, scale=1.0)


def without_gradients(fn):
    return torch.no_grad()(fn)


def partial(fn):
    return functools.partial(fn)


NEUTRAL = [
    traced, blocking_parameters, blocking_nothing, configured, seeded, unconditioned, broadcasting, markov,
    conditioned_on_nothing, substituting_nothing, lifted_from_nothing, done_to_nothing, equalizing_nothing,
    reparameterised_nowhere, escaping_never, masked_by_true, scaled_by_one, without_gradients, partial,
]  # fmt: skip
SIDES = {
    "both": (lambda handler: handler, lambda handler: handler),
    "student": (lambda handler: handler, lambda handler: lambda fn: fn),
    "teacher": (lambda handler: lambda fn: fn, lambda handler: handler),
    "teacher, frozen": (lambda handler: lambda fn: fn, lambda handler: lambda fn: freeze(handler(fn))),
    "frozen teacher": (lambda handler: lambda fn: fn, lambda handler: lambda fn: handler(freeze(fn))),
}


@pytest.mark.parametrize("handler", NEUTRAL, ids=lambda handler: handler.__name__)
@pytest.mark.parametrize("side", SIDES)
@both
def test_handlers_that_change_nothing(loss, handler, side):
    of_student, of_teacher = (choose(handler) for choose in SIDES[side])
    terms = loss(["x"]).terms(of_student(program(STUDENT)), of_teacher(program(TEACHER)))
    assert values_of(terms) == pytest.approx(PLAIN[loss])
