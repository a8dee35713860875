"""SurrogateKD and LocalKD have the values worked out by hand, and 0 where student equals teacher."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from models.helmholtz import HelmholtzMachine
from pyro_kd import LocalKD, freeze
from pyro_kd.divergences import kl
from tests.support.loss_options import both
from tests.support.loss_programs import chain
from tests.support.losses import SurrogateKD


def test_bounds_of_the_gaussian_example(float64):
    """z ~ N(0, 1), y ~ N(z, s^2), a student whose mean of z is off by delta: the closed forms are in the docstring of LocalKD."""
    delta, s = 0.7, 0.5

    def program(mean):
        def model():
            with pyro.plate("rows", 1000):
                z = pyro.sample("z", dist.Normal(mean, 1.0))
                pyro.sample("y", dist.Normal(z, s))

        return model

    teacher, student = program(torch.tensor(0.0)), program(torch.tensor(delta))
    surrogate = SurrogateKD(["y"], latent_weight=0.0).loss(student, teacher) / 1000
    local = LocalKD(["y"]).loss(student, teacher) / 1000
    truth = float(kl(dist.Normal(0.0, (1 + s**2) ** 0.5), dist.Normal(delta, (1 + s**2) ** 0.5), torch.tensor(0.0)))
    assert surrogate == pytest.approx(delta**2 / (2 * s**2))
    assert local == pytest.approx(delta**2 / 2)
    assert truth == pytest.approx(delta**2 / (2 * (1 + s**2)))


@both
def test_the_loss_is_0_where_student_equals_teacher(loss):
    program = chain(torch.tensor([0.3, 1.0, -0.5, 2.0]))
    terms = loss(["x"]).terms(program, program)
    assert {name: term.value.item() for name, term in terms.items()} == {"z1": 0.0, "z2": 0.0, "x": 0.0}


@both
def test_the_loss_is_0_where_student_equals_teacher_with_discrete_latents(loss):
    torch.manual_seed(0)
    program = HelmholtzMachine(4).model
    assert all(term.value.item() == 0.0 for term in loss(["y1", "y2"]).terms(program, freeze(program), 100).values())


def test_an_autoregressive_target_depends_on_the_teachers_values():
    """y2 depends on z1 and y1. In the student, these are its own z1 and the teacher's y1 (y_<j in Eq. 4)."""
    seen = {}

    def program(shift, label):
        def model():
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            y1 = pyro.sample("y1", dist.Normal(z, 1.0))
            seen[label] = z, y1
            pyro.sample("y2", dist.Normal(z + 10 * y1, 1.0))

        return model

    loss = SurrogateKD(["y1", "y2"], latent_weight=0.0)
    run = loss.particles(program(5.0, "student"), program(0.0, "teacher"))[0].run
    (z_teacher, y_teacher), (z_student, y_student) = seen["teacher"], seen["student"]
    assert torch.allclose(z_student, z_teacher + 5.0)
    assert torch.equal(y_student, y_teacher)
    y2 = run.pairs[-1]
    assert torch.equal(y2.q.loc, z_student + 10 * y_teacher)
    assert torch.equal(y2.p.loc, z_teacher + 10 * y_teacher)


def test_local_gives_the_teachers_latents():
    run = LocalKD(["x"]).particles(chain(torch.ones(4)), chain(torch.zeros(4)))[0].run
    assert [pair.name for pair in run.pairs] == ["z1", "z2", "x"]
    for pair in run.pairs:
        assert torch.equal(pair.value, pair.student_value)
