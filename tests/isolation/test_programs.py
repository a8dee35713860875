"""freeze, losses and training loops refuse what is not a Pyro program, and say what to pass."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_kd import Distiller, freeze
from pyro_kd.errors import InvalidProgramError
from tests.support.losses import SurrogateKD


def model():
    return pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def generator():
    yield model()


async def coroutine():
    model()


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 2)

    def model(self):
        return model()


class CallsItself(nn.Module):
    """A module with a call of its own in place of forward."""

    def __call__(self):
        return model()


class Samples:
    def __call__(self):
        return model()


class HoldsALoss(nn.Module):
    """A program, although it has an attribute with that name."""

    def __init__(self):
        super().__init__()
        self.loss = SurrogateKD(["x"])

    def forward(self):
        return model()


def svi():
    return SVI(model, model, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())


NONE = {
    "a name": (lambda: "model", "str 'model', which cannot be called"),
    "nothing": (lambda: None, "which cannot be called"),
    "a result": (lambda: model(), "Tensor .*which cannot be called"),
    "a list": (lambda: [model], "which cannot be called"),
    "MCMC": (lambda: MCMC(NUTS(model), 3), "which cannot be called"),
    "a distribution": (lambda: dist.Normal(0.0, 1.0), r"a distribution, .*lambda: pyro.sample\('x', distribution\)"),
    "a distribution's method": (lambda: dist.Normal(0.0, 1.0).sample, "a distribution, "),
    "a flow": (lambda: dist.TransformedDistribution(dist.Normal(0.0, 1.0), []), "a distribution, "),
    "a transform": (lambda: dist.transforms.ExpTransform(), "a transform, "),
    "a guide's class": (lambda: AutoNormal, r"a class: .*AutoNormal\(\.\.\.\)"),
    "a model's class": (lambda: VAE, r"a class: .*VAE\(\.\.\.\)"),
    "a partial of a class": (lambda: functools.partial(VAE), "a class: "),
    "a module without forward": (VAE, r"a module without forward\(\).*vae\.model"),
    "a list of modules": (lambda: nn.ModuleList(), r"a module without forward\(\)"),
    "an ELBO": (Trace_ELBO, "a loss, "),
    "an ELBO of two programs": (lambda: Trace_ELBO()(model, model), "a loss with its two programs"),
    "a loss": (lambda: SurrogateKD(["x"]), "a loss, "),
    "a loss of two programs": (lambda: SurrogateKD(["x"])(model, model), "a loss with its two programs"),
    "SVI": (svi, "an algorithm, "),
    "SVI's method": (lambda: svi().step, "an algorithm, "),
    "a handler": (lambda: poutine.scale(scale=2.0), "a handler or plate without a program"),
    "a plate": (lambda: pyro.plate("rows", 3), "a handler or plate without a program"),
    "an optimiser": (lambda: pyro.optim.Adam({"lr": 0.1}), "an optimiser"),
    "a builtin": (lambda: print, "a builtin function"),
    "a function of torch": (lambda: torch.randn, "a builtin function"),
    "a generator": (lambda: generator, "coroutine or a generator"),
    "a coroutine": (lambda: coroutine, "coroutine or a generator"),
}
PROGRAMS = {
    "function": lambda: model,
    "lambda": lambda: lambda: model(),
    "partial": lambda: functools.partial(model),
    "handler": lambda: poutine.scale(model, scale=2.0),
    "handler of a partial": lambda: poutine.scale(functools.partial(model), scale=2.0),
    "method": lambda: VAE().model,
    "module with a call": CallsItself,
    "object": Samples,
    "object's call": lambda: Samples().__call__,
    "module with a loss": HoldsALoss,
    "frozen": lambda: freeze(model),
    "decorated": lambda: functools.lru_cache(model),
}


@pytest.mark.parametrize("case", NONE)
def test_freeze_names_what_it_got_and_what_to_pass(case):
    make, message = NONE[case]
    with pytest.raises(
        InvalidProgramError, match=rf"(?s)the model to freeze is .*{message}.*Pass a Pyro model: a function with"
    ):
        freeze(make())


@pytest.mark.parametrize("case", NONE)
def test_losses_and_training_loops_name_the_wrong_argument(case):
    wrong, message = NONE[case][0](), NONE[case][1]
    with pytest.raises(InvalidProgramError, match=rf"(?s)the student \(first argument\).*{message}"):
        SurrogateKD(["x"])(wrong, model)
    with pytest.raises(InvalidProgramError, match=rf"(?s)the teacher \(second argument\).*{message}"):
        SurrogateKD(["x"]).loss(model, wrong)
    with pytest.raises(InvalidProgramError, match=rf"(?s)the student is .*{message}"):
        Distiller(wrong, model, lambda params: torch.optim.Adam(params), SurrogateKD(["x"]))


@pytest.mark.parametrize("case", PROGRAMS)
def test_programs_of_all_forms_are_accepted(case):
    assert freeze(PROGRAMS[case]())().shape == ()
