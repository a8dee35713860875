"""A user's own loss that reads an option itself: captured, it follows the option."""

import functools
import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import freeze
from tests.support.losses import SurrogateKD

pytestmark = pytest.mark.usefixtures("one_thread")


class Chain(nn.Module):
    """z -> y."""

    def __init__(self, loc):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(loc))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5))


class Scaled(SurrogateKD):
    """Reads an option of the loss, which is better taken from the terms."""

    def combine(self, particles):
        return super().combine(particles) * self.latent_weight


class ScaledInGenerator(SurrogateKD):
    def combine(self, particles):
        return sum(super(ScaledInGenerator, self).combine([particle]) * self.latent_weight for particle in particles)


class ScaledInList(SurrogateKD):
    def combine(self, particles):
        return torch.stack([super(ScaledInList, self).combine([each]) * self.latent_weight for each in particles]).sum()


class ScaledInLambda(SurrogateKD):
    def combine(self, particles):
        return (lambda: super(ScaledInLambda, self).combine(particles) * self.latent_weight)()


class ScaledByProperty(SurrogateKD):
    @property
    def factor(self):
        return 2.0 * self.latent_weight

    def combine(self, particles):
        return super().combine(particles) * self.factor


class ScaledByCachedProperty(SurrogateKD):
    @functools.cached_property
    def weigh(self):
        return lambda value: value * self.latent_weight

    def combine(self, particles):
        return self.weigh(super().combine(particles))


class ScaledByName(SurrogateKD):
    def combine(self, particles):
        return super().combine(particles) * getattr(self, "_".join(["latent", "weight"]))


class ScaledByStaticMethod(SurrogateKD):
    @staticmethod
    def factor(loss):
        return loss.latent_weight

    def combine(self, particles):
        return super().combine(particles) * self.factor(self)


def factor_of(loss):
    return loss.latent_weight


def indirectly(loss):
    return factor_of(loss)


class ScaledByFunction(SurrogateKD):
    def combine(self, particles):
        return super().combine(particles) * indirectly(self)


class ScaledByAttribute(SurrogateKD):
    def __init__(self, targets):
        super().__init__(targets)
        self.factor = factor_of

    def combine(self, particles):
        return super().combine(particles) * self.factor(self)


class Scale:
    def __call__(self, loss):
        return loss.latent_weight


class ScaledByObject(SurrogateKD):
    def combine(self, particles):
        return super().combine(particles) * Scale()(self)


@pytest.mark.parametrize(
    "kind",
    [
        *(Scaled, ScaledInGenerator, ScaledInList, ScaledInLambda, ScaledByProperty, ScaledByCachedProperty, ScaledByName),
        *(ScaledByStaticMethod, ScaledByFunction, ScaledByAttribute, ScaledByObject),
    ],
)
def test_a_compiled_loss_that_reads_its_weight_follows_it(kind):
    student, frozen = Chain(1.0), freeze(Chain(0.0))
    eager, captured = kind(["y"]), kind(["y"]).compile(backend=None)
    for weight in (1.0, 2.0, 3.0):
        values = []
        for loss in (eager, captured):
            loss.latent_weight = weight
            pyro.set_rng_seed(0)
            values.append(loss(student, frozen)(8).item())
        assert values[0] == pytest.approx(values[1], rel=1e-5)


class Doubled(SurrogateKD):
    """Takes its weights from the terms, by a function and a constant of its own."""

    factor = 2.0

    def combine(self, particles):
        return torch.stack([twice(self, super(Doubled, self).combine([particle])) for particle in particles]).sum()


def twice(loss, value):
    return value * loss.factor


def test_a_compiled_loss_that_takes_its_weights_from_the_terms_needs_one_graph(caplog):
    caplog.set_level(logging.INFO, "pyro_kd.capture")
    student, frozen = Chain(1.0), freeze(Chain(0.0))
    loss = Doubled(["y"], teacher_forcing=0.0).compile(backend=None)
    module = loss(student, frozen)
    for weight in (1.0, 2.0, 3.0):
        loss.latent_weight = weight
        module(8)
    assert sum(": graph " in message for message in caplog.messages) == 1
