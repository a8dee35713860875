"""It is an error if the loss depends on no parameter of the student: in a plain loop, with SVI and with Distiller."""

import copy
import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_kd import Distiller, LocalKD, freeze
from pyro_kd.errors import NoParametersError
from pyro_kd.losses.learning import unreached_parameters
from pyro_kd.training import ELBOObjective, Trainer
from tests.support.losses import SurrogateKD


class Net(nn.Module):
    """Draws y around a location that a function computes from the module."""

    def __init__(self, loc=1.0, compute=lambda net: net.loc):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(loc))
        self.compute = compute

    def forward(self, *args):
        pyro.sample("y", dist.Normal(self.compute(self), 1.0))


def under_no_grad(net):
    with torch.no_grad():
        return net.loc * 2


def in_a_new_parameter(net):
    return nn.Parameter(net.loc.detach())


def in_a_copied_state(net):
    fresh = Net(0.0)
    fresh.load_state_dict(net.state_dict())
    return fresh.loc


COPIES = {
    "deepcopy": lambda net: copy.deepcopy(net).loc,
    "a new parameter": in_a_new_parameter,
    "a copied state": in_a_copied_state,
    "a detached leaf": lambda net: net.loc.detach().requires_grad_(),
    "a new leaf from a number": lambda net: torch.tensor(net.loc.item(), requires_grad=True),
}
DETACHED = {
    "detach": lambda net: net.loc.detach(),
    "data": lambda net: net.loc.data,
    "no_grad": under_no_grad,
    "clone of data": lambda net: net.loc.data.clone(),
    "a number": lambda net: net.loc.item(),
}
each = pytest.mark.parametrize("way", [*COPIES, *DETACHED])


@each
@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
def test_it_is_an_error_in_a_plain_loop(way, loss):
    student = Net(1.0, (COPIES | DETACHED)[way])
    with pytest.raises(NoParametersError, match="depends on no parameter of the student"):
        loss(["y"])(student, freeze(Net(0.0)))().backward()
    assert student.loc.grad is None


@each
def test_it_is_an_error_with_svi(way):
    def student():
        pyro.module("net", net)
        net()

    net = Net(1.0, (COPIES | DETACHED)[way])
    with pytest.raises(NoParametersError):
        SVI(student, freeze(Net(0.0)), pyro.optim.Adam({"lr": 0.1}), SurrogateKD(["y"])).step()


@each
@pytest.mark.parametrize("log_every", [1, 50])
def test_it_is_an_error_with_distiller(way, log_every):
    student = Net(1.0, (COPIES | DETACHED)[way])
    distiller = Distiller(
        student, freeze(Net(0.0)), lambda params: torch.optim.Adam(params, lr=0.1), SurrogateKD(["y"]), log_every=log_every
    )
    with pytest.raises(NoParametersError):
        distiller.fit(steps=2, progress=False)


@pytest.mark.parametrize("way", COPIES)
def test_it_is_an_error_with_an_elbo(way):
    net = Net(1.0, COPIES[way])
    model = pyro.condition(net, data={"y": torch.tensor(0.0)})
    objective = ELBOObjective(Trace_ELBO(), model, lambda: None)
    trainer = Trainer(objective, lambda params: torch.optim.Adam(params, lr=0.1))
    with pytest.raises(NoParametersError):
        trainer.fit(steps=2, progress=False)


def test_the_message_names_a_parameter_and_remedies():
    with pytest.raises(
        NoParametersError, match=r"such as 'loc'.*creates in each run, with copy.deepcopy.*torch.no_grad\(\)"
    ):
        SurrogateKD(["y"])(Net(1.0, COPIES["deepcopy"]), freeze(Net(0.0)))()


def test_it_is_an_error_in_a_compiled_loss():
    loss = SurrogateKD(["y"])(Net(1.0, COPIES["a detached leaf"]), freeze(Net(0.0)))
    loss.compile(backend=None)
    with pytest.raises(NoParametersError):
        loss()


def test_a_student_without_parameters_is_an_error():
    with pytest.raises(NoParametersError):
        SurrogateKD(["y"])(lambda: pyro.sample("y", dist.Normal(1.0, 1.0)), freeze(Net(0.0)))()
    leaf = lambda: pyro.sample("y", dist.Normal(torch.tensor(1.0, requires_grad=True), 1.0))  # noqa: E731
    with pytest.raises(NoParametersError, match="which has none"):
        SurrogateKD(["y"])(leaf, freeze(Net(0.0)))()


def test_such_a_student_can_be_evaluated():
    for compute in COPIES.values():
        with torch.no_grad():
            assert SurrogateKD(["y"])(Net(1.0, compute), freeze(Net(0.0)))() == 0.5
        assert SurrogateKD(["y"]).loss(Net(1.0, compute), freeze(Net(0.0))) == 0.5


class Registry:
    net = None


@functools.cache
def cached_copy(net):
    return copy.deepcopy(net)


def test_what_outlives_a_run_is_trained_wherever_it_is_stored():
    """A copy made once, a tensor in the closure and an attribute of a class are ordinary parameters."""
    leaf = torch.tensor(1.0, requires_grad=True)
    Registry.net = Net(1.0)
    for student in (
        Net(1.0, lambda net: cached_copy(net).loc),
        lambda: pyro.sample("y", dist.Normal(leaf, 1.0)),
        lambda: pyro.sample("y", dist.Normal(Registry.net.loc, 1.0)),
        lambda: pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 1.0)),
    ):
        SurrogateKD(["y"])(student, freeze(Net(0.0)))().backward()
    assert leaf.grad == Registry.net.loc.grad == 1.0


def test_arguments_may_be_trained():
    """An encoder may be outside the programs. A warning says if the student's own parameters get no gradient."""

    def student(x):
        pyro.sample("y", dist.Normal(x, 1.0))

    def teacher(x):
        pyro.sample("y", dist.Normal(0.0, 1.0))

    x = torch.tensor(1.0, requires_grad=True)
    SurrogateKD(["y"])(student, teacher)(x).backward()
    assert x.grad == 1.0
    net = Net(1.0)
    with pytest.warns(UserWarning, match="on its arguments, but on no parameter of the student, such as 'net.loc'"):
        SurrogateKD(["y"])(lambda x: pyro.sample("y", dist.Normal(x + net.loc.detach(), 1.0)), teacher)(x)


def test_unreached_parameters_are_listed():
    used, unused, frozen = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False)

    def student(x):
        pyro.module("used", used)
        pyro.param("spare", torch.tensor(0.0))
        with torch.no_grad():
            hidden = unused(x)
        return pyro.sample("y", dist.Normal(used(x) + hidden + frozen(x), 1.0).to_event(2))

    trace = pyro.poutine.trace(student).get_trace(torch.ones(1, 1))
    value = trace.nodes["y"]["fn"].base_dist.loc
    assert sorted(unreached_parameters([value], student, trace)) == ["spare", "unused.bias", "unused.weight"]
    assert sorted(unreached_parameters([value], student)) == ["unused.bias", "unused.weight"]
    assert sorted(unreached_parameters([], student)) == ["unused.bias", "unused.weight", "used.bias", "used.weight"]
