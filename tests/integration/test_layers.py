"""Layers that are initialised by their first input, that draw or keep statistics; and runs without gradients."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import freeze
from tests.support.inputs import X
from tests.support.loss_options import both, particles
from tests.support.losses import SurrogateKD


class Net(nn.Module):
    """y ~ N(net(x), 1)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        mean = self.net(x).squeeze(-1)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0))


def sum_of_columns(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x.sum(-1), 1.0))


@both
@particles
def test_a_lazy_layer_of_the_student(loss, options):
    student = Net(nn.LazyLinear(1))
    module = loss(["y"], **options)(student, sum_of_columns)
    value = module(X)
    value.backward()
    weight, bias = student.net.weight, student.net.bias
    residual = (X @ weight.detach().T + bias.detach()).squeeze(-1) - X.sum(-1)
    assert float(value.detach()) == pytest.approx(float(residual.square().sum() / 2), rel=1e-5)
    assert torch.allclose(weight.grad, (residual @ X)[None], atol=1e-5)


@both
def test_a_lazy_layer_of_the_teacher(loss):
    """Initialised by the first run of an unfrozen teacher; then it can be frozen."""
    teacher = Net(nn.LazyLinear(1))
    student = Net(nn.Linear(2, 1))
    value = loss(["y"]).loss(student, teacher, X)
    assert loss(["y"]).loss(student, freeze(teacher), X) == pytest.approx(value)


@both
@particles
@pytest.mark.filterwarnings("ignore:the student draws these outside")
def test_dropout_of_the_student_is_its_own(loss, options):
    """Of ones: 0 or 2 in training, against the teacher's 1, so 1/2 for each row whatever is drawn; and 1 in evaluation."""
    student, teacher = Net(nn.Dropout(0.5)), Net(nn.Dropout(0.5))
    module = loss(["y"], **options)(student, teacher)
    ones = torch.ones(64, 1, requires_grad=True)
    assert teacher.training
    assert float(module(ones).detach()) == pytest.approx(32.0)
    assert teacher.training
    module.eval()
    assert float(module(ones).detach()) == 0.0
    frozen = freeze(teacher)
    module = loss(["y"], **options)(student.train(), frozen)
    assert float(module(ones).detach()) == pytest.approx(32.0)


@pytest.mark.parametrize(
    ("options", "runs"),
    [({}, 1), ({"num_particles": 3}, 3), ({"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2}, 1)],
    ids=["one", "loop", "vectorized"],
)
@both
def test_batch_statistics_move_with_each_run_of_the_student_alone(loss, options, runs):
    norms = [nn.BatchNorm1d(1, affine=False) for _ in range(2)]
    student, teacher = (Net(nn.Sequential(nn.Linear(2, 1), norm)) for norm in norms)
    loss(["y"], **options)(student, teacher)(X)
    assert [int(norm.num_batches_tracked) for norm in norms] == [runs, 0]
    assert torch.equal(norms[1].running_mean, torch.zeros(1))
    mean = student.net[0](X).mean(0)
    expected = mean * (1 - 0.9**runs)
    assert torch.allclose(norms[0].running_mean, expected.detach(), atol=1e-6)


# Gradient modes.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@both
@particles
def test_the_loss_without_gradients(loss, options, mode):
    """The same number, for the same noise; and training goes on afterwards."""
    student, frozen = Net(nn.Linear(2, 1)), freeze(Net(nn.Linear(2, 1)))
    module = loss(["y"], **options)(student, frozen)
    with mode():
        value = module(X)
        assert not value.requires_grad
        assert loss(["y"], **options).loss(student, frozen, X) == pytest.approx(float(value))
    trained = module(X)
    assert float(trained.detach()) == pytest.approx(float(value))
    trained.backward()
    assert student.net.weight.grad.abs().sum() > 0


def test_inputs_made_in_inference_mode():
    with torch.inference_mode():
        x = X * 2
    value = SurrogateKD(["y"]).loss(Net(nn.Linear(2, 1)), freeze(sum_of_columns), x)
    assert value > 0
    loc = torch.tensor(1.0, requires_grad=True)

    def shifted(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x.sum(-1) + loc, 1.0))

    SurrogateKD(["y"])(shifted, freeze(sum_of_columns))(x).backward()
    assert float(loc.grad) == pytest.approx(3.0)


def test_a_teacher_frozen_in_inference_mode():
    teacher, student = Net(nn.Linear(2, 1)), Net(nn.Linear(2, 1))
    with torch.inference_mode():
        frozen = freeze(teacher)
    SurrogateKD(["y"])(student, frozen)(X).backward()
    assert student.net.weight.grad.abs().sum() > 0
