"""The gradients of the losses: right at frozen noise, for the student alone, and untouched where a call fails."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from models.helmholtz import HelmholtzMachine
from pyro_kd import freeze
from tests.support.loss_programs import chain, vector_program
from tests.support.losses import SurrogateKD


def test_surrogate_gradient_equals_finite_differences_at_frozen_noise(float64):
    teacher = chain(torch.tensor([0.0, 1.0, -0.7, 2.0]))
    weight = torch.tensor([0.3, 0.8, -0.5, 1.5], requires_grad=True)
    loss = SurrogateKD(["x"], latent_weight=lambda name: {"z1": 0.5, "z2": 2.0}[name])

    def value(w):
        pyro.set_rng_seed(7)
        return loss.differentiable_loss(chain(w), teacher)

    (gradient,) = torch.autograd.grad(value(weight), weight)
    for i in range(4):
        step = torch.zeros(4)
        step[i] = 1e-6
        with torch.no_grad():
            numerical = (value(weight + step) - value(weight - step)) / 2e-6
        assert gradient[i] == pytest.approx(float(numerical), rel=1e-5)


def test_discrete_latents_are_trained_only_by_the_latent_loss():
    teacher = freeze(HelmholtzMachine(4).model)

    def gradients(**options):
        student = HelmholtzMachine(16)
        # Both programs start at 0, where the latent loss has no gradient.
        torch.nn.init.constant_(student.generative.z4, 0.5)
        pyro.clear_param_store()
        SurrogateKD(["y1", "y2"], **options).loss_and_grads(student.model, teacher, 200)
        groups = dict.fromkeys(("z4", "z3", "z2", "z1", "y2", "y1"), 0.0)
        for name, p in student.generative.named_parameters():
            groups[name.split(".")[0]] += 0.0 if p.grad is None else float(p.grad.abs().sum())
        return groups

    surrogate_only = gradients(latent_weight=0.0)
    assert surrogate_only["y1"] > 0
    assert surrogate_only["y2"] > 0
    assert all(surrogate_only[name] == 0 for name in ("z1", "z2", "z3", "z4"))
    assert all(value > 0 for value in gradients(latent_weight=1.0).values())


def test_the_teacher_gets_no_gradient():
    teacher, net = vector_program(5, "teacher")
    student, _ = vector_program(3, "student")
    module = SurrogateKD(["x"])(student, teacher)
    module().backward()
    assert all(p.grad is None for p in net.parameters())

    class Leaf(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(3))

        def forward(self):
            pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1))

    with pyro.settings.context(module_local_params=True):
        leaf, other = Leaf(), Leaf()
        SurrogateKD(["x"])(other, leaf)().backward()
    assert leaf.loc.grad is None  # although the parameter itself is the location of the distribution
    assert leaf.loc.requires_grad
    assert other.loc.grad is not None


def test_any_exception_between_particles_leaves_no_gradient():
    w, calls = pyro.param("w", torch.tensor(0.0)), []

    def student():
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("mine")
        pyro.sample("x", dist.Normal(pyro.param("w"), 1.0))

    with pytest.raises(KeyError, match="mine"):
        SurrogateKD(["x"], num_particles=2).loss_and_grads(student, lambda: pyro.sample("x", dist.Normal(3.0, 1.0)))
    assert w.grad is None


def test_inputs_with_gradients_are_not_shared_parameters():
    encoder = nn.Linear(2, 2)

    def program(net):
        def model(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(net(x).squeeze(-1), 1.0))

        return model

    student, teacher = nn.Linear(2, 1), nn.Linear(2, 1)
    SurrogateKD(["y"])(program(student), program(teacher))(encoder(torch.randn(5, 2))).backward()
    assert encoder.weight.grad is not None
    assert teacher.weight.grad is None


def test_an_unfrozen_teachers_parameter_that_appears_later_gets_no_gradient():
    w, v = torch.tensor(1.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)

    def teacher(late):
        pyro.sample("x", dist.Normal(w if late else torch.tensor(1.0), 1.0))

    module = SurrogateKD(["x"])(lambda late: pyro.sample("x", dist.Normal(v, 1.0)), teacher)
    module(False).backward()
    module(True).backward()
    assert w.grad is None
    assert v.grad == -2.0


def without_latents():
    pyro.sample("x", dist.Normal(0.0, 1.0))


def test_retain_graph_allows_a_second_backward():
    shared = torch.tensor(1.0, requires_grad=True)
    square = shared**2

    def student():
        pyro.sample("x", dist.Normal(square, 1.0))

    loss = SurrogateKD(["x"], retain_graph=True)
    for _ in range(2):
        loss.loss_and_grads(student, without_latents)
    assert shared.grad == 4.0
    with pytest.raises(RuntimeError, match="second time"):
        for _ in range(2):
            SurrogateKD(["x"]).loss_and_grads(student, without_latents)
