"""After freeze, Pyro's parameter store still holds the original's entries: what new students make of that."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import nn

from pyro_kd import Distiller, MultiSampleKD, check, freeze
from pyro_kd.errors import NoParametersError, SharedParameterError
from tests.support.losses import SurrogateKD

pytestmark = pytest.mark.filterwarnings("ignore:the student draws these outside")  # dropout in train mode


def linear_program(net, name="net"):
    def model(x):
        pyro.module(name, net)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 1.0))

    return model


@pytest.mark.parametrize("sizes", [((2, 1), (2, 1)), ((2, 8, 1), (2, 3, 1))], ids=["same shape", "other shape"])
def test_a_new_student_with_the_teachers_names_needs_a_cleared_store(sizes):
    """The usual order: train the teacher with SVI, freeze it, make the student. Pyro hands the student the teacher's tensors."""

    def make(widths):
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        return nn.Sequential(*layers)

    x = torch.randn(32, 2)
    teacher = linear_program(make(sizes[0]))
    teacher(x)
    frozen = freeze(teacher)
    net = make(sizes[1])
    svi = SVI(linear_program(net), frozen, Adam({"lr": 0.05}), SurrogateKD(["y"]))
    with pytest.raises(SharedParameterError, match=r"'net.0.weight', so SVI would not train.*pyro.clear_param_store\(\)"):
        svi.step(x)
    assert all(p.grad is None for p in net.parameters())
    pyro.clear_param_store()
    svi = SVI(linear_program(net), frozen, Adam({"lr": 0.05}), SurrogateKD(["y"]))
    first = svi.step(x)
    for _ in range(200):
        svi.step(x)
    assert svi.step(x) < 0.05 * first


class PyroDecoder(PyroModule):
    def __init__(self, width):
        super().__init__()
        self.net = PyroModule[nn.Sequential](PyroModule[nn.Linear](2, width), PyroModule[nn.Linear](width, 1))
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(self.net(x).squeeze(-1), 1.0))


@pytest.fixture(params=["pyro.module", "PyroModule"])
def student_on_a_full_store(request):
    """A new student with the names of a program that was run and frozen, the frozen program, and data."""

    def make(width):
        return PyroDecoder(width) if request.param == "PyroModule" else linear_program(nn.Linear(2, width))

    x = torch.randn(32, 2)
    teacher = make(1)
    teacher(x)
    return make(1), freeze(teacher), x


def test_the_check_says_what_training_refuses(student_on_a_full_store):
    student, frozen, x = student_on_a_full_store
    loss = SurrogateKD(["y"])
    report = check(loss, student, frozen, x)
    (problem,) = report.errors
    assert set(report.unreached) <= {"unused"}  # and not what the store holds for the original
    with pytest.raises(SharedParameterError) as of_svi:
        SVI(student, frozen, Adam({"lr": 0.05}), loss).step(x)
    distiller = Distiller(student, frozen, lambda params: torch.optim.Adam(params, lr=0.05), loss)
    with pytest.raises(SharedParameterError) as of_distiller:
        distiller.fit(x, steps=1, progress=False)
    assert problem.text == str(of_svi.value) == str(of_distiller.value)
    assert isinstance(problem.error, SharedParameterError)
    pyro.clear_param_store()
    assert check(loss, student, frozen, x).is_ok
    distiller.fit(x, steps=1, progress=False)


def test_the_check_says_so_for_a_loss_that_combines_particles(student_on_a_full_store):
    student, frozen, x = student_on_a_full_store
    report = check(MultiSampleKD(["y"], num_samples=3), student, frozen, x)
    assert [type(problem.error) for problem in report.errors] == [SharedParameterError]


@pytest.mark.parametrize("asked", [torch.ones(1), lambda: torch.ones(1)], ids=["tensor", "function"])
def test_the_check_warns_of_a_parameter_with_the_shape_of_a_different_program(asked):
    def program(start):
        def model():
            pyro.sample("y", dist.Normal(pyro.param("w", start).sum(), 1.0))

        return model

    teacher = program(torch.ones(2))
    teacher()
    frozen = freeze(teacher)
    (problem,) = check(SurrogateKD(["y"]), program(asked), frozen).problems
    assert not problem.is_error
    assert "tensor of shape (2,) under the name 'w', where it asks for shape (1,)" in problem.text
    assert "pyro.clear_param_store()" in problem.text
    assert check(SurrogateKD(["y"]), teacher, frozen).problems == ()  # the student continues from its own values
    pyro.clear_param_store()
    assert check(SurrogateKD(["y"]), program(asked), frozen).problems == ()


def test_a_module_that_svi_does_not_see_is_an_error():
    net = nn.Linear(2, 1)

    def student(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 1.0))

    frozen = freeze(linear_program(nn.Linear(2, 1)))
    with pytest.raises(NoParametersError, match="SVI does not see.*pyro.module"):
        SVI(student, frozen, Adam({"lr": 0.05}), SurrogateKD(["y"])).step(torch.randn(5, 2))
    SurrogateKD(["y"])(student, frozen)(torch.randn(5, 2)).backward()
    assert net.weight.grad is not None


def test_a_student_may_continue_from_its_own_frozen_copy():
    net = nn.Linear(2, 1)
    student, x = linear_program(net), torch.randn(16, 2)
    student(x)
    svi = SVI(student, freeze(student), Adam({"lr": 0.05}), SurrogateKD(["y"]))
    assert svi.step(x) == 0.0
    with torch.no_grad():
        net.weight.add_(1.0)
    assert svi.step(x) > 0.0


class Trainer:
    def __init__(self):
        self.net, self.teacher = nn.Linear(2, 1), None

    def model(self, x):
        return linear_program(self.net)(x)


def test_freezing_again_and_again_does_not_grow():
    """An object that holds its last teacher, as a continual trainer does."""
    trainer, sizes = Trainer(), []
    for _ in range(6):
        trainer.teacher = freeze(trainer.model)
        sizes.append(len(trainer.teacher._tensors))
    assert len(set(sizes)) == 1
