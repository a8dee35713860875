"""Programs that compute gradients, as energy and score models do: leaves created in a run are not parameters."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

from pyro_kd import Distiller, LocalKD, freeze, site_report
from pyro_kd.errors import NoParametersError, SharedParameterError
from pyro_kd.training import ELBOObjective, Trainer
from tests.support.losses import SurrogateKD


def energy_net(width):
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1, bias=False))


def by_detached_leaf(energy, z):
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (force,) = torch.autograd.grad(energy(z).sum(), z, create_graph=True)
    return force


def without_enable_grad(energy, z):
    """As users write it, without a thought of running it under no_grad."""
    z = z.detach().requires_grad_()
    return torch.autograd.grad(energy(z).sum(), z, create_graph=True)[0]


def in_place(energy, z):
    """The latent itself becomes a leaf."""
    z.requires_grad_(True)
    return torch.autograd.grad(energy(z).sum(), z, create_graph=True)[0]


def by_zero_offset(energy, z):
    """With respect to a new leaf that is added."""
    with torch.enable_grad():
        offset = torch.zeros(z.shape, requires_grad=True)
        return torch.autograd.grad(energy(z + offset).sum(), offset, create_graph=True)[0]


def by_functional_grad(energy, z):
    return torch.func.grad(lambda z: energy(z).sum())(z)


def langevin(energy, z):
    """Several steps, each with its own leaf."""
    for _ in range(2):
        z = z - 0.1 * by_detached_leaf(energy, z)
    return z


FORCES = [by_detached_leaf, without_enable_grad, in_place, by_zero_offset, by_functional_grad, langevin]
each_force = pytest.mark.parametrize("force", FORCES, ids=lambda force: force.__name__)
SIMPLE = [by_detached_leaf, without_enable_grad, in_place]


def program(width, force=by_detached_leaf, register=True):
    energy = energy_net(width)

    def model(rows):
        if register:
            pyro.module("energy", energy)
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(force(energy, z), 0.5).to_event(1))

    model.energy = energy
    return model


def improves(losses):
    return sum(losses[-10:]) < 0.9 * sum(losses[:10])


@each_force
def test_svi_trains(force):
    teacher = freeze(program(8, force))
    svi = SVI(program(4, force), teacher, pyro.optim.Adam({"lr": 0.03}), SurrogateKD(["x"]))
    assert improves([svi.step(32) for _ in range(60)])


@each_force
def test_distiller_trains(force):
    distiller = Distiller(
        program(4, force), freeze(program(8, force)), lambda params: torch.optim.Adam(params, lr=0.03), SurrogateKD(["x"])
    )
    assert improves(list(distiller.fit(32, steps=60, progress=False)["loss"]))


@each_force
@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
def test_equal_programs_have_loss_0_and_no_gradient_reaches_the_teacher(force, loss):
    model = program(8, force)
    value = loss(["x"])(model, freeze(model))(32)
    assert value.item() == 0.0
    teacher, student = program(8, force, register=False), program(4, force)
    loss(["x"])(student, teacher)(32).backward()
    assert all(param.grad is None for param in teacher.energy.parameters())
    assert all(param.requires_grad for param in teacher.energy.parameters())
    assert all(param.grad is not None for param in student.energy.parameters())


@pytest.mark.parametrize("force", SIMPLE, ids=lambda force: force.__name__)
def test_the_gradient_in_a_plain_loop_equals_finite_differences(force, float64):
    teacher, student = freeze(program(6, force)), program(3, force)
    loss = SurrogateKD(["x"])(student, teacher)
    weight = student.energy[0].weight

    def value(shift):
        pyro.set_rng_seed(1)
        with torch.no_grad():
            weight[0, 0] += shift
        result = loss(8)
        result.backward()
        return result.item()

    values = value(-1e-5), value(2e-5)
    weight.grad = None
    value(-1e-5)
    slope = (values[1] - values[0]) / 2e-5
    assert weight.grad[0, 0].item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("force", SIMPLE, ids=lambda force: force.__name__)
def test_the_loss_without_gradients_and_in_reports(force):
    teacher, student = freeze(program(6, force)), program(3, force)
    loss = SurrogateKD(["x"])
    assert loss.loss(student, teacher, 8) > 0
    assert {name: term.value.item() for name, term in loss.terms(student, teacher, 8).items()}["x"] > 0
    assert "x" in str(site_report(loss, student, teacher, 8, num_samples=2))
    values = teacher(8)
    assert values is None or not values.requires_grad


@pytest.mark.parametrize("force", SIMPLE, ids=lambda force: force.__name__)
def test_an_elbo_trains(force):
    model = program(4, force)
    data = torch.randn(32, 2) + torch.tensor([2.0, 0.0])

    def observed(rows):
        return pyro.condition(model, data={"x": data})(rows)

    def guide(rows):
        with pyro.plate("rows", rows):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))

    trainer = Trainer(ELBOObjective(Trace_ELBO(), observed, guide), lambda params: torch.optim.Adam(params, lr=0.05))
    losses = list(trainer.fit(32, steps=60, progress=False)["loss"])
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_module_whose_forward_computes_gradients_trains():
    class Score(PyroModule):
        def __init__(self, width):
            super().__init__()
            self.energy = energy_net(width)

        def forward(self, rows):
            return program_of(self.energy)(rows)

    def program_of(energy):
        def model(rows):
            with pyro.plate("rows", rows):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                return pyro.sample("x", dist.Normal(without_enable_grad(energy, z), 0.5).to_event(1))

        return model

    student, frozen = Score(3), freeze(Score(6))
    assert not frozen(4).requires_grad
    SurrogateKD(["x"])(student, frozen)(16).backward()
    assert all(param.grad is not None for param in student.parameters())


def test_a_module_that_svi_does_not_see_is_still_an_error():
    teacher = freeze(program(8))
    with pytest.raises(NoParametersError, match="SVI does not see"):
        SVI(program(4, register=False), teacher, pyro.optim.Adam({"lr": 0.03}), SurrogateKD(["x"])).step(8)


def test_a_parameter_of_both_programs_is_still_an_error():
    model = program(4, register=False)
    with pytest.raises(SharedParameterError):
        SurrogateKD(["x"])(model, model)(8)
    other = program(4, in_place)
    pyro.clear_param_store()
    other(8)
    frozen = freeze(other)
    svi = SVI(program(4, in_place), frozen, pyro.optim.Adam({"lr": 0.03}), SurrogateKD(["x"]))
    with pytest.raises(SharedParameterError, match=r"clear_param_store\(\)"):
        svi.step(8)


def test_looking_for_leaves_draws_no_random_numbers():
    def draws(force):
        pyro.set_rng_seed(3)
        pyro.clear_param_store()
        torch.manual_seed(3)
        svi = SVI(program(4, force), freeze(program(8, force)), pyro.optim.Adam({"lr": 0.03}), SurrogateKD(["x"]))
        svi.step(8)
        return torch.rand(())

    assert draws(by_detached_leaf) == draws(by_functional_grad)
