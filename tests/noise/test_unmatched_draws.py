"""Draws that only one program makes are reported, with file and line, once; initial values are not noise."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoIAFNormal

from pyro_kd import MarginalKD, freeze
from pyro_kd.errors import UnsupportedNoiseError
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


def before_all(drawn):
    def model():
        pyro.sample("y", dist.Normal(drawn(), 1.0))

    return model


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            model_of(lambda: np.random.randn()),
            "a program draws from numpy.random after site 'z': noise that is not torch's cannot be shared",
        ),
        (
            before_all(lambda: random.random()),
            "a program draws from Python's random before the first site: noise that is not torch's",
        ),
        (
            before_all(lambda: OWN_GENERATOR.normal()),
            "a program draws from the Generator 'OWN_GENERATOR': noise that is not torch's",
        ),
    ],
)
def test_draws_of_numpy_and_python_are_placed_and_not_to_be_shared(model, text):
    with pytest.warns(UserWarning, match=text) as caught:
        SurrogateKD(["y"]).loss(model_of(lambda: 0.0) if "'z'" in text else before_all(lambda: 0.0), freeze(model))
    (warning,) = caught
    assert "Draw with torch or by pyro.sample instead" in str(warning.message)
    assert "To share a draw" not in str(warning.message)
    assert "unknown" not in str(warning.message)


class DrawnByNumPy(dist.TorchDistribution):
    """A normal distribution whose sampler is NumPy's."""

    arg_constraints = {}
    support = dist.constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def sample(self, sample_shape=()):
        return self.loc.detach() + torch.tensor(np.random.normal(size=self.batch_shape), dtype=self.loc.dtype)

    def log_prob(self, value):
        return dist.Normal(self.loc, 1.0).log_prob(value)

    def expand(self, batch_shape, _instance=None):
        return DrawnByNumPy(self.loc.expand(batch_shape))


def model_with(family, site):
    def model():
        z = pyro.sample("z", (family if site == "z" else lambda loc: dist.Normal(loc, 1.0))(torch.zeros(3)).to_event(1))
        loc = pyro.param("loc", torch.tensor(0.5))
        pyro.sample("y", (family if site == "y" else lambda loc: dist.Normal(loc, 1.0))(z + loc).to_event(1))

    return model


def test_a_target_may_be_drawn_by_numpy():
    """The student is given its value, so that no noise has to be shared. Warnings are errors here."""
    student = model_with(lambda loc: dist.Normal(loc, 1.0), "")
    SurrogateKD(["y"]).loss(student, freeze(model_with(DrawnByNumPy, "y")))
    with pytest.raises(
        UnsupportedNoiseError, match=r"site 'z': DrawnByNumPy draws nothing that torch.*Draw with torch \(not with"
    ):
        SurrogateKD(["y"]).loss(student, freeze(model_with(DrawnByNumPy, "z")))


def test_a_loss_that_shares_no_noise_does_not_warn():
    def teacher():
        pyro.sample("y", dist.Bernoulli(0.2 + 0.1 * np.random.rand()))

    def student():
        pyro.sample("y", dist.Bernoulli(0.5))

    MarginalKD(["y"], cross_entropy=True).loss(student, freeze(teacher))


def test_the_initial_value_of_a_parameter_is_not_noise():
    frozen = freeze(model_of(lambda: 0.0))
    SurrogateKD(["y"]).loss(model_of(lambda: 0.0), frozen)  # the student's parameter is made in this call


def test_the_set_up_of_a_flow_guide_is_not_noise():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    teacher, student = AutoIAFNormal(model), AutoIAFNormal(model)
    teacher()
    SurrogateKD(["z"]).loss(student, freeze(teacher))  # the student's networks are made in this call
