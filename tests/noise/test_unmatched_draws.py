"""Draws that only one program makes are reported, with file and line, once; initial values are not noise."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoIAFNormal

from pyro_kd import freeze
from tests.support.losses import SurrogateKD
from tests.support.noisy_programs import Net

OWN_GENERATOR = np.random.default_rng(0)
OWN_RANDOM = random.Random(0)


def test_dropout_of_the_student_alone_warns_once_and_trains_on():
    student = Net()
    teacher = freeze(Net())
    loss = SurrogateKD(["y"])
    with pytest.warns(UserWarning, match=r"the student draws these .*bernoulli_ at .*noisy_programs.py:\d+"):
        loss.differentiable_loss(student, teacher).backward()
    for _ in range(3):  # warnings are errors here
        loss.differentiable_loss(student, teacher).backward()
    assert student.net[0].weight.grad.abs().sum() > 0


def test_dropout_that_begins_later_warns_when_it_begins():
    student, teacher = Net().eval(), freeze(Net())
    loss = SurrogateKD(["y"])
    for _ in range(3):
        loss.loss(student, teacher)
    student.train()
    with pytest.warns(UserWarning, match="bernoulli_"):
        _ = [loss.loss(student, teacher) for _ in range(3)]


def model_of(between):
    def model():
        weight = pyro.param("weight", lambda: torch.randn(()))  # an initial value is no noise of the program
        z = pyro.sample("z", dist.Normal(weight, 1.0))
        pyro.sample("y", dist.Normal(z + between(), 1.0))

    return model


@pytest.mark.parametrize(
    ("teacher", "student", "text"),
    [
        (lambda: torch.randn(()), lambda: 0.0, r"the teacher draws these .*randn at .*test_unmatched_draws.py:\d+"),
        (lambda: 0.0, lambda: torch.randn(()), r"the student draws these .*randn at .*test_unmatched_draws.py:\d+"),
        (
            lambda: torch.rand(()),
            lambda: torch.randperm(3)[0],
            "the student draws these .*randperm.*the teacher draws these .*rand",
        ),
        (lambda: np.random.randn(), lambda: np.random.randn(), "numpy.random"),
        (lambda: OWN_GENERATOR.normal(), lambda: OWN_GENERATOR.normal(), "Generator 'OWN_GENERATOR'"),
        (lambda: 0.0, lambda: OWN_RANDOM.random(), "Random 'OWN_RANDOM'"),
        (lambda: random.random(), lambda: random.random(), "Python's random"),
    ],
)
def test_the_warning_of_unmatched_draws_names_file_and_line(teacher, student, text):
    pyro.set_rng_seed(0)
    frozen = freeze(model_of(teacher))
    loss = SurrogateKD(["y"])
    with pytest.warns(UserWarning, match=text) as caught:
        _ = [loss.loss(model_of(student), frozen) for _ in range(2)]
    assert len(caught) == 1


def test_the_initial_value_of_a_parameter_is_not_noise():
    frozen = freeze(model_of(lambda: 0.0))
    SurrogateKD(["y"]).loss(model_of(lambda: 0.0), frozen)  # the student's parameter is made in this call


def test_the_set_up_of_a_flow_guide_is_not_noise():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    teacher, student = AutoIAFNormal(model), AutoIAFNormal(model)
    teacher()
    SurrogateKD(["z"]).loss(student, freeze(teacher))  # the student's networks are made in this call
