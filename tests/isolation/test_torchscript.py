"""TorchScript networks in teacher and student: registered, frozen, kept in eval mode, and trained."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_kd import freeze
from pyro_kd.isolation.modes import evaluation_mode
from tests.support.losses import SurrogateKD

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Centre(nn.Module):
    """Exchanges its buffer, and writes to another one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.count += 1
        return x - self.mean


def layers():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), Centre(), nn.Dropout(0.5))


def plain():
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh())


def scripted(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(net)


def traced(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net.eval(), torch.zeros(2, 2))


KINDS = {
    "scripted": lambda: scripted(plain()),
    "scripted, with modes": lambda: scripted(layers()),
    "traced": lambda: traced(plain()),
    "a scripted part": lambda: nn.Sequential(scripted(nn.Linear(2, 3)), nn.Tanh()),
    "a scripted part without parameters": lambda: nn.Sequential(nn.Linear(2, 3), scripted(nn.Tanh())),
}


def program(net, name="net", register=True):
    def model(x):
        if register:
            pyro.module(name, net)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x), 1.0).to_event(1))

    return model


X = torch.randn(4, 2)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "not frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_scripted_networks_give_gradients_to_the_student_only(kind, frozen):
    net, own = KINDS[kind](), KINDS[kind]()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    teacher = freeze(program(net)) if frozen else program(net, "teacher")
    loss = SurrogateKD(["y"])(program(own), teacher)
    values = [loss(X) for _ in range(3)]
    values[-1].backward()
    assert all(value > 0 for value in values)
    if "modes" not in kind:
        assert values[0] == values[1] == values[2]
    assert all(param.grad is not None for param in own.parameters())
    assert set(loss.parameters()) == set(own.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert all(param.grad is None for param in net.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_svi_trains_scripted_networks(kind):
    svi = SVI(program(KINDS[kind]()), freeze(program(KINDS[kind]())), pyro.optim.Adam({"lr": 0.05}), SurrogateKD(["y"]))
    losses = [svi.step(X) for _ in range(30)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_scripted_teacher_is_a_copy_in_eval_mode():
    net = scripted(layers())
    frozen = freeze(program(net))
    assert not any(module.training for held in frozen.modules_held for module in held.modules())
    assert all(module.training for module in net.modules())
    ones = torch.ones(1, 2)
    before = pyro.poutine.trace(frozen).get_trace(ones).nodes["y"]["fn"].mean
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(7.0)
    assert torch.equal(pyro.poutine.trace(frozen).get_trace(ones).nodes["y"]["fn"].mean, before)


def test_an_optimised_scripted_network_can_be_the_teacher():
    """torch.jit.freeze leaves no parameters and no mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.jit.freeze(torch.jit.script(layers().eval()))
    for teacher in (freeze(program(net, register=False)), program(net, register=False)):
        own = plain()
        SurrogateKD(["y"])(program(own), teacher)(X).backward()
        assert own[0].weight.grad is not None


def test_buffers_that_scripted_code_replaces_are_restored():
    net = scripted(layers())
    centre = list(net.children())[2]  # net[2] is the Python module that it was made of
    with evaluation_mode(net):
        centre.training = True
        centre(torch.ones(4, 3))
    assert torch.equal(centre.mean, torch.zeros(3))
    assert centre.count == 0
    net.eval()
    assert torch.equal(centre(torch.ones(4, 3)), torch.ones(4, 3))


def test_a_replaced_parameter_is_registered_again():
    own = nn.Sequential(scripted(nn.Linear(2, 3)), nn.Linear(3, 3))
    loss = SurrogateKD(["y"])(program(own), freeze(program(plain())))
    for _ in range(2):
        loss(X)
    own[1].weight = nn.Parameter(torch.zeros(3, 3))
    pyro.clear_param_store()
    loss(X)
    assert pyro.get_param_store()._params["net$$$1.weight"] is own[1].weight
