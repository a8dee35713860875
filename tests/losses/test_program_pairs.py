"""What a loss knows of a pair of programs, and that it is known of no other pair."""

import warnings
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_kd import LocalKD, bound_report, freeze
from pyro_kd.errors import SharedParameterError, SupportMismatchError
from pyro_kd.losses import run_pair, terms_of
from tests.support.losses import SurrogateKD


@dataclass
class Program:
    """Programs of one width are equal, and have networks of their own."""

    width: int

    def __post_init__(self):
        self.net = nn.Linear(self.width, 1)

    def __call__(self):
        pyro.sample("y", dist.Normal(self.net(torch.ones(self.width)), 1.0).to_event(1))


def teacher():
    pyro.sample("y", dist.Normal(torch.zeros(1), 1.0).to_event(1))


def test_equal_programs_are_told_apart():
    first, second, loss = Program(3), Program(3), SurrogateKD(["y"])
    assert first == second
    for program in (first, second, first):
        value = loss(program, teacher)()
        assert value.item() == pytest.approx(program.net(torch.ones(3)).item() ** 2 / 2, rel=1e-5)
        program.net.zero_grad()
        value.backward()
        assert program.net.bias.grad.abs() > 0
    assert len(loss._pairs._pairs) == 2


def test_a_bound_method_is_one_program():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 1)

        def model(self):
            pyro.sample("y", dist.Normal(self.net(torch.ones(1)), 1.0).to_event(1))

    holder, loss = Holder(), SurrogateKD(["y"])
    for _ in range(3):
        loss.loss(holder.model, teacher)
    assert len(loss._pairs._pairs) == 1


def shared():
    loc = pyro.param("loc", torch.zeros(1))
    pyro.sample("y", dist.Normal(loc, 1.0).to_event(1))


def shared_too():
    shared()


@pytest.mark.parametrize(
    "use",
    [
        lambda loss: loss.loss(shared, shared_too),
        lambda loss: loss.loss_and_grads(shared, shared_too),
        lambda loss: loss(shared, shared_too)(),
        lambda loss: loss.terms(shared, shared_too),
        lambda loss: bound_report(shared, shared_too, ["y"]),
        lambda loss: run_pair(shared, shared_too, targets=["y"]),
    ],
    ids=["loss", "loss_and_grads", "module", "terms", "bound_report", "run_pair"],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_a_shared_parameter_is_an_error_with_and_without_gradients(use, gradients):
    with pytest.raises(SharedParameterError, match="'loc' belongs to both"), torch.set_grad_enabled(gradients):
        use(SurrogateKD(["y"]))


def test_terms_of_a_run_give_an_unfrozen_teacher_no_gradient():
    theirs, mine = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))
    run = run_pair(
        lambda: pyro.sample("y", dist.Normal(mine, 1.0)), lambda: pyro.sample("y", dist.Normal(theirs, 1.0)), targets=["y"]
    )
    (term,) = terms_of(run)
    term.value.backward()
    assert mine.grad is not None
    assert theirs.grad is None


def noisy(loc):
    def model():
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(loc() + torch.randn(()), 1.0))

    return model


def test_a_warning_is_given_once_per_loss():
    student, frozen = noisy(lambda: pyro.param("loc", torch.tensor(1.0))), freeze(quiet_model)
    loss = SurrogateKD(["y"], num_particles=2, vectorize_particles=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            loss.loss_and_grads(student, frozen)
        loss.compile(backend=None)
        loss.loss_and_grads(student, frozen)
    assert sum("outside" in str(warning.message) for warning in caught) == 1


def quiet_model():
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(0.0, 1.0))


def test_a_site_that_cannot_be_compared_hints_at_swapped_programs():
    def gamma():
        pyro.sample("y", dist.Gamma(1.0, 1.0))

    def normal():
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    with pytest.raises(SupportMismatchError, match="The student is a frozen program. If it is the teacher, swap them"):
        LocalKD(["y"])(freeze(gamma), normal)()


def test_terms_of_several_particles_are_in_memory_one_by_one():
    """The runs are dropped as soon as their terms are there."""
    alive, most = set(), []

    class Tracked(dist.Normal):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    def model():
        pyro.sample("y", Tracked(torch.zeros(()), 1.0, validate_args=False))

    with torch.no_grad(), poutine.block():
        SurrogateKD(["y"], num_particles=1).terms(model, freeze(model))
        one = max(most)
        SurrogateKD(["y"], num_particles=12).terms(model, freeze(model))
    assert max(most) <= 3 * one


@pytest.mark.parametrize("options", [{"reuse": 2}, {}])
def test_a_program_that_is_made_anew_for_each_call_loses_its_draws_and_graphs_with_a_warning(options):
    loss, student = SurrogateKD(["y"], **options), Program(3)
    if not options:
        loss.compile(backend=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            loss.differentiable_loss(lambda: student(), teacher)
    assert ["If a program is made anew for each call, make it once" in str(each.message) for each in caught] == [True]


def test_a_plain_loss_of_many_pairs_says_nothing():
    loss = SurrogateKD(["y"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            loss.loss(Program(3), teacher)
