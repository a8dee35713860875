"""pyro.module skips a student that is registered already, without any other effect."""

import copy
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn

from pyro_kd import SurrogateKD, freeze


def counted(monkeypatch):
    """The names that pyro.module is called with."""
    names, inner = [], pyro.module
    monkeypatch.setattr(pyro, "module", lambda name, *args, **kwargs: (names.append(name), inner(name, *args, **kwargs))[1])
    return names


class Registering(nn.Module):
    """A net of two layers, registered in each run."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

    def model(self):
        pyro.module("net", self.net)
        pyro.sample("y", dist.Normal(self.net(torch.ones(2)), 1.0).to_event(1))


def test_a_student_is_registered_in_its_first_runs_only(monkeypatch):
    student, names = Registering(), counted(monkeypatch)
    module = SurrogateKD(["y"])(student.model, freeze(Registering().model))
    counts = []
    for _ in range(5):
        names.clear()
        module().backward()
        counts.append(len(names))
    assert counts == [
        2,
        1,
        0,
        0,
        0,
    ]  # the teacher's in the first run; the student's in one that is traced for parameters, and in one
    assert set(pyro.get_param_store()._params.values()) == set(student.net.parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda student: pyro.clear_param_store(),
        lambda student: pyro.get_param_store().__setitem__("net$$$0.weight", torch.zeros(2, 2)),
        lambda student: setattr(student.net, "0", nn.Linear(2, 2)),
        lambda student: setattr(student.net[1], "bias", nn.Parameter(torch.zeros(1))),
        lambda student: student.net.append(nn.Linear(1, 1)),
        lambda student: student.net.eval()[0].weight.requires_grad_(False),
        lambda student: student.net.register_parameter("more", nn.Parameter(torch.zeros(1))),
    ],
    ids=["store", "value", "submodule", "parameter", "longer", "frozen", "more"],
)
def test_a_student_that_changed_is_registered_again(change, monkeypatch):
    student = Registering()
    module = SurrogateKD(["y"])(student.model, freeze(Registering().model))
    for _ in range(3):
        module()
    names = counted(monkeypatch)
    module()
    assert names == []
    change(student)
    store, net = pyro.get_param_store(), student.net
    module()
    assert names == ["net"]
    assert {f"net$$${name}" for name, param in net.named_parameters() if param.requires_grad} <= set(store)


def test_handlers_that_need_parameters_get_them():
    """SVI, a handler around the loss, and one inside the student."""
    student, teacher, loss = Registering(), freeze(Registering().model), SurrogateKD(["y"])
    for _ in range(3):
        loss.differentiable_loss(student.model, teacher)
    with poutine.trace(param_only=True) as captured:
        loss.differentiable_loss(student.model, teacher)
    assert len(captured.trace) == 4
    before = [param.clone() for param in student.net.parameters()]
    SVI(student.model, teacher, Adam({"lr": 0.1}), loss).step()
    assert all((one != two).any() for one, two in zip(before, student.net.parameters(), strict=True))

    drawn, names = [], [name for name in captured.trace.nodes if "$$$" in name]
    lifted = poutine.lift(student.model, lambda *_, **__: (drawn.append(1), torch.zeros(()))[1])
    prior = SurrogateKD(["y"], fresh=names)
    for count in (4, 8, 12):
        prior.differentiable_loss(lifted, teacher)
        assert len(drawn) == count


def test_a_copied_or_pickled_loss_knows_no_modules_and_a_dropped_student_is_freed():
    student, teacher, loss = Registering(), freeze(Registering().model), SurrogateKD(["y"])
    for _ in range(3):
        loss.differentiable_loss(student.model, teacher)
    assert len(loss._seen.registered._modules) == 1
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), copy.copy(loss)):
        assert len(other._seen.registered._modules) == 0
    net = weakref.ref(student.net)
    loss._seen = copy.copy(loss._seen)  # as it is, without the pair of programs that a loss remembers
    loss._seen.learning, loss._seen.modes = None, []
    loss._seen.between = type(loss._seen.between)()
    loss._seen.programs, loss._seen.validation = None, type(loss._seen.validation)()
    del student
    pyro.clear_param_store()
    assert net() is None
