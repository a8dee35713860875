"""A loop in plain PyTorch: parameters(), modes and state of the bound loss, for all kinds of students."""

import copy
import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_kd import freeze
from tests.support.losses import SurrogateKD
from tests.support.network_students import (
    ELSEWHERE,
    STUDENTS,
    ByAttribute,
    ByClass,
    Module,
    bound,
    by_registered_closure,
    draw,
    network,
)


def assert_trains(module):
    optim, losses = torch.optim.Adam(module.parameters(), lr=0.02), []
    for _ in range(60):
        optim.zero_grad()
        loss = module(64)
        loss.backward()
        optim.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("way", STUDENTS)
def test_parameters_are_known_before_the_first_call_and_train(way):
    net = network()
    module = bound(STUDENTS[way](net))
    assert set(module.parameters()) == set(net.parameters())
    module.eval()
    assert not any(part.training for part in net.modules())
    module.train()
    assert all(part.training for part in net.modules())
    assert_trains(module)
    assert set(module.parameters()) == set(net.parameters())


@pytest.mark.parametrize("way", ELSEWHERE)
def test_modules_outside_the_student_are_found_and_train(way):
    student, net = ELSEWHERE[way]
    module = bound(student)
    assert set(module.parameters()) == set(net.parameters())
    module(8).backward()
    assert all(param.grad is not None for param in net.parameters())
    net.zero_grad()


def test_a_global_with_the_name_of_an_attribute_is_not_the_students():
    """The student uses an attribute. A network in a global of the same name does not belong to the student."""
    namespace = {"draw": draw, "net": network(), "nn": nn}
    source = (
        "class Student(nn.Module):\n"
        "    def __init__(self, own):\n"
        "        super().__init__()\n"
        "        self.net = own\n"
        "    def forward(self, rows):\n"
        "        return draw(self.net, rows)\n"
    )
    exec(source, namespace)
    own = network()
    assert set(bound(namespace["Student"](own)).parameters()) == set(own.parameters())


def with_scale(net, name="scale"):
    def model(rows):
        pyro.module("decoder", net)
        scale = pyro.param(name, torch.tensor(0.6), constraint=dist.constraints.positive)
        return draw(net, rows, scale)

    return model


@pytest.mark.parametrize("name", ["scale", "noise.scale", "add_module"])
def test_parameters_of_the_store_are_known_after_a_call(name):
    net = network()
    module = bound(with_scale(net, name))
    module(8)
    stored = pyro.get_param_store()._params[name]
    assert set(module.parameters()) == {*net.parameters(), stored}
    assert all(param.is_leaf and param.requires_grad for param in module.parameters())
    assert_trains(module)
    assert stored.exp().item() != pytest.approx(0.6)


def test_an_optimiser_created_too_early_gives_a_warning():
    module = bound(with_scale(network()))
    torch.optim.Adam(module.parameters())
    with pytest.warns(
        UserWarning, match="does not reach pyro.param 'scale' before the student has run.*Call this module once"
    ):
        module(8)
    module(8)


def test_parameters_that_appear_in_a_later_call_are_found():
    net = network()

    def student(rows, late=False):
        scale = pyro.param("scale", torch.tensor(0.3)) if late else 0.3
        return draw(net, rows, scale)

    def teacher(rows, late=False):
        return draw(lambda z: z[..., :1], rows, 0.3)

    module = SurrogateKD(["x"])(student, teacher)
    module(8)
    assert len(list(module.parameters())) == 4
    with pytest.warns(UserWarning, match="pyro.param 'scale'"):
        module(8, late=True)
    assert pyro.get_param_store()._params["scale"] in set(module.parameters())


def test_tensors_in_the_closure_are_parameters():
    weight = torch.zeros(2, 1, requires_grad=True)
    constant = torch.ones(1)
    module = bound(lambda rows: draw(lambda z: z @ weight + constant, rows))
    assert list(module.parameters()) == [weight]
    module(8).backward()
    assert weight.grad is not None


def test_a_network_that_the_student_creates_in_the_first_run_is_found():
    class Lazy:
        net = None

        def __call__(self, rows):
            if self.net is None:
                self.net = network()
            return draw(self.net, rows)

    student = Lazy()
    module = bound(student)
    assert not list(module.parameters())
    module(8)
    assert set(module.parameters()) == set(student.net.parameters())


def test_a_student_that_creates_a_network_in_every_run_gives_a_warning():
    """The initial weights are then random draws of the program, not the values of parameters."""
    scale = torch.ones((), requires_grad=True)
    module = bound(lambda rows: draw(lambda x: network()(x) * scale, rows))
    module(8)
    module(8)  # advances the random streams, so the next run finds out what is drawn
    with pytest.warns(UserWarning, match=r"the student draws these outside .*uniform_ at .*network_students\.py"):
        module(8)


def test_the_state_is_saved_and_loaded_by_names():
    net, other = network(), network()
    module = bound(with_scale(net))
    module(8)
    state = copy.deepcopy(module.state_dict())
    assert set(state) == {"reached.scale", *("reached.net." + name for name in net.state_dict())}
    twin = bound(with_scale(other))
    twin(8)
    twin.load_state_dict(state)
    assert all(torch.equal(value, state["reached.net." + name]) for name, value in other.state_dict().items())


def test_the_modules_are_moved_and_cast():
    net = network()
    module = bound(with_scale(net))
    module(8)
    module.to(torch.float64)
    assert {param.dtype for param in (*net.parameters(), *module.parameters())} == {torch.float64}
    assert {tensor.dtype for tensor in module.teacher.tensors()} == {torch.float64}


def test_a_frozen_teacher_inside_a_student_has_no_parameters_of_the_student():
    class Continual(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.old = freeze(by_registered_closure(network()))

        def model(self, rows):
            return draw(self.net, rows)

    continual = Continual()
    assert set(bound(continual.model).parameters()) == set(continual.net.parameters())


def test_the_student_of_the_readme():
    """Its two weights and two biases are found before it has run."""
    module = bound(by_registered_closure(network()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_trains(module)


# What a notebook shows.


def test_a_bound_loss_shows_its_programs():
    net = network(4)
    module = bound(with_scale(net))
    assert repr(module).splitlines() == [
        "DistillationModule",
        "  loss     SurrogateKD(targets=['x'], latent_weight=0.1, teacher_forcing=0.0)",
        "  student  with_scale.model: 17 parameters; pyro.param statements are known after a call",
        "  teacher  freeze(by_registered_closure.model), of size 65, in eval mode",
    ]
    module(8)
    assert "with_scale.model: 18 parameters\n" in repr(module)
    shown = module._repr_html_()
    assert shown.startswith("<table>")
    assert "SurrogateKD(targets=[&#x27;x&#x27;], latent_weight=0.1, teacher_forcing=0.0)" in shown


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (lambda: by_registered_closure(network()), "by_registered_closure.model"),
        (lambda: Module(network()), "Module"),
        (lambda: Module(network()).model, "Module.model"),
        (lambda: functools.partial(draw, network()), "partial of draw"),
        (lambda: poutine.scale(by_registered_closure(network()), scale=1.0), "by_registered_closure.model"),
        (lambda: ByAttribute(network()).model, "ByAttribute.model"),
        (ByClass, "ByClass"),
    ],
)
def test_a_frozen_program_shows_its_program(program, name):
    frozen = freeze(program())
    assert repr(frozen).startswith(f"freeze({name}), of size ")
    assert "\n" not in repr(frozen)
    assert "in eval mode" in repr(frozen)
    assert "in train mode" in repr(freeze(Module(network()), keep_modes=True))


def test_a_frozen_program_is_shown_as_a_table_in_a_notebook():
    shown = freeze(by_registered_closure(network(4)))._repr_html_()
    assert "<th>net.0.weight</th><td>(4, 2)</td>" in shown


def test_options_of_a_compiled_module_are_those_of_its_own_loss():
    loc = torch.tensor(1.0, requires_grad=True)

    def program(loc):
        def model():
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

        return model

    loss = SurrogateKD(["x"], latent_weight=0.5)
    eager, captured = loss(program(loc), program(0.0)), loss(program(loc), program(0.0))
    captured.compile(backend=None)
    assert captured.loss is not loss
    for weight in (0.5, 2.0):
        loss.latent_weight = captured.loss.latent_weight = weight
        assert captured().item() == pytest.approx(eager().item())
    assert loss.compile_options is None
