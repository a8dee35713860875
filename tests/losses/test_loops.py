"""Pyro's and PyTorch's loops: the same steps, particles, parameters, arguments; a call leaves no trace of its own."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn

from models.helmholtz import HelmholtzMachine
from pyro_kd import freeze
from tests.support.loss_options import both
from tests.support.loss_programs import chain, vector_program
from tests.support.losses import SurrogateKD


@both
def test_the_loss_is_averaged_over_particles(loss):
    teacher, student = chain(torch.tensor([0.0, 1.0, -0.7, 2.0])), chain(torch.tensor([0.3, 0.8, -0.5, 1.5]))
    one = [loss(["x"]).loss(student, teacher) for _ in range(200)]
    many = loss(["x"], num_particles=200).loss(student, teacher)
    vectorized = loss(["x"], num_particles=200, vectorize_particles=True).loss(student, teacher)
    mean, error = torch.tensor(one).mean(), torch.tensor(one).std() / 200**0.5
    assert abs(many - mean) < 5 * 2**0.5 * error
    assert abs(vectorized - mean) < 5 * 2**0.5 * error


def test_vectorized_particles_equal_a_batch(float64):
    """Two particles of 50 rows in one plate: the same draws as the plate of shape (2, 50), and half their sum."""
    teacher, student = chain(torch.tensor([0.0, 1.0, -0.7, 2.0])), chain(torch.tensor([0.3, 0.8, -0.5, 1.5]))
    loss = SurrogateKD(["x"], num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    pyro.set_rng_seed(3)
    vectorized = loss.loss(student, teacher)
    outer = pyro.plate("outer", 2, dim=-2)
    pyro.set_rng_seed(3)
    batch = SurrogateKD(["x"]).loss(outer(student), outer(teacher))
    assert vectorized == pytest.approx(batch / 2)
    guessing = SurrogateKD(["x"], num_particles=2, vectorize_particles=True)
    guessing.loss(student, teacher)
    assert guessing.max_plate_nesting == 2


@both
def test_svi_and_plain_torch_take_the_same_steps(loss, float64):
    teacher, _ = vector_program(6)
    frozen = freeze(teacher)
    student, net = vector_program(3)
    start = copy.deepcopy(net.state_dict())
    pyro.set_rng_seed(1)
    svi = SVI(student, frozen, Adam({"lr": 0.01}), loss(["x"]))
    by_svi = [svi.step(16) for _ in range(5)]
    after_svi = copy.deepcopy(net.state_dict())
    net.load_state_dict(start)
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    module = loss(["x"])(student, frozen)
    optim = torch.optim.Adam(net.parameters(), lr=0.01)
    by_torch = []
    for _ in range(5):
        optim.zero_grad()
        value = module(16)
        value.backward()
        optim.step()
        by_torch.append(value.item())
    assert by_svi == pytest.approx(by_torch)
    for name, value in net.state_dict().items():
        assert torch.allclose(value, after_svi[name]), name


def test_the_module_has_only_the_students_parameters():
    teacher, student = HelmholtzMachine(8), HelmholtzMachine(2)

    class Program(nn.Module):
        def __init__(self, machine):
            super().__init__()
            self.machine = machine

        def forward(self, n):
            return self.machine.model(n)

    module = SurrogateKD(["y1", "y2"])(Program(student), Program(teacher))
    assert set(module.parameters()) == set(student.parameters())
    teacher.train()
    module.eval()
    assert teacher.training
    assert not student.training
    module.to(torch.float64)
    assert next(teacher.parameters()).dtype == torch.float64
    assert set(module.state_dict()) == {"student.machine." + name for name in student.state_dict()}


def test_inputs_are_passed_as_arguments():
    net = nn.Linear(3, 1)

    def student(x, *, shift):
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1) + shift, 1.0))

    def teacher(x, *, shift):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x.sum(-1) + shift, 1.0))

    svi = SVI(student, teacher, Adam({"lr": 0.1}), SurrogateKD(["y"]))
    for _ in range(200):
        svi.step(torch.randn(64, 3), shift=2.0)
    assert torch.allclose(net.weight, torch.ones(1, 3), atol=0.05)
    assert svi.evaluate_loss(torch.randn(64, 3), shift=2.0) < 0.2


def test_one_loss_serves_several_pairs():
    """What is known about an unfrozen teacher must not leak into the next pair."""
    first, _ = vector_program(4, "first")
    second, net = vector_program(3, "second")
    third, _ = vector_program(2, "third")
    loss = SurrogateKD(["x"])
    loss.differentiable_loss(third, second).backward()
    assert all(p.grad is None for p in net.parameters())
    loss.differentiable_loss(second, first).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_call_of_the_loss_changes_only_the_random_stream():
    teacher, _ = vector_program(4)
    frozen = freeze(teacher)
    student, net = vector_program(3)
    before = copy.deepcopy(net.state_dict())
    SurrogateKD(["x"]).loss(student, frozen)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_the_parameters_of_a_bound_method_are_those_of_its_module():
    machine = HelmholtzMachine(2)
    module = SurrogateKD(["y1", "y2"])(machine.model, freeze(HelmholtzMachine(4).model))
    assert set(module.parameters()) == set(machine.parameters())
    module.to(torch.float64)
    assert next(machine.parameters()).dtype == torch.float64
    assert module.teacher._tensors[0].dtype == torch.float64


def test_guessing_the_plates_does_not_change_batch_statistics():
    norm = nn.BatchNorm1d(1)

    def student():
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(norm(z.reshape(-1, 1)).reshape(z.shape), 1.0))

    loss = SurrogateKD(["x"], num_particles=2, vectorize_particles=True)
    loss._guess_max_plate_nesting(student, freeze(student), (), {})
    assert norm.num_batches_tracked == 0
    assert norm.training


def test_a_module_whose_parameters_are_partly_in_the_store_warns():
    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def forward(self):
            scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
            pyro.sample("x", dist.Normal(self.loc, scale))

    module = SurrogateKD(["x"])(Program(), lambda: pyro.sample("x", dist.Normal(1.0, 1.0)))
    with pytest.warns(UserWarning, match="does not reach pyro.param 'scale'"):
        module()
    module().backward()  # warns only once
