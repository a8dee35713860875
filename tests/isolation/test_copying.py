"""freeze copies whatever a program reaches its parameters through, and leaves the original alone."""

import collections
import functools
import io
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyro_kd import freeze
from pyro_kd.errors import SharedParameterError
from tests.support.frozen_programs import assert_same_state, sample_through, state
from tests.support.losses import SurrogateKD

pytestmark = pytest.mark.filterwarnings("ignore:the student draws these outside")  # dropout in train mode


class Holder:
    """An object of the user's own, that is no module."""

    def __init__(self, decode):
        self.decode = decode

    def model(self):
        return sample_through(self.decode)


class ModuleWithFunction(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.decode = lambda z: net(z)

    def forward(self):
        return sample_through(self.decode)


class Slotted:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net

    def __call__(self):
        return sample_through(self.net)


GLOBAL_NET = nn.Linear(1, 1)


def global_model():
    return sample_through(GLOBAL_NET)


class UsesGlobal:
    def model(self):
        return sample_through(GLOBAL_NET)


def by_default_argument(net):
    def model(net=net):
        return sample_through(net)

    return model


def by_keyword_default(net):
    def model(*, net=net):
        return sample_through(net)

    return model


def by_function_attribute(net):
    def helper(z):
        return helper.net(z)

    helper.net = net
    return lambda: sample_through(helper)


def by_recursion(net):
    def model(depth=2):
        return model(depth - 1) if depth else sample_through(net)

    return model


def by_ordered_dict(net):
    table = collections.OrderedDict(decode=lambda z: net(z))
    return lambda: sample_through(table["decode"])


def by_list_that_holds_itself(net):
    items = [net]
    items.append(items)
    return lambda: sample_through(items[1][0])


def by_lock_beside(net):
    holder = Holder(net)
    holder.lock, holder.file = threading.Lock(), io.StringIO()
    return holder.model


def by_flow(net):
    class Shift(dist.transforms.Transform):
        domain, codomain, bijective = constraints.real, constraints.real, True

        def __init__(self):
            super().__init__()
            self.net = net

        def _call(self, x):
            return x + self.net.weight.squeeze()

        def _inverse(self, y):
            return y - self.net.weight.squeeze()

        def log_abs_det_jacobian(self, x, y):
            return torch.zeros_like(x)

    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(1), 1.0), [Shift()]).to_event(1)

    def model():
        with pyro.plate("rows", 6):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            return pyro.sample("x", flow)

    return model


def by_distribution_in_the_closure(net):
    fn = dist.Normal(net.bias, 1.0).to_event(1)

    def model():
        with pyro.plate("rows", 6):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            return pyro.sample("x", fn)

    return model


def by_torchscript(net):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, z):
            return self.net(z)

    scripted = torch.jit.script(Plain())
    return lambda: sample_through(scripted)


REACHES = {
    "default argument": by_default_argument,
    "keyword default": by_keyword_default,
    "function attribute": by_function_attribute,
    "recursion": by_recursion,
    "ordered dict of functions": by_ordered_dict,
    "list that holds itself": by_list_that_holds_itself,
    "object with a function": lambda net: Holder(lambda z: net(z)).model,
    "module with a function": ModuleWithFunction,
    "slots": Slotted,
    "lock and file beside": by_lock_beside,
    "flow": by_flow,
    "TorchScript": by_torchscript,
    "distribution": by_distribution_in_the_closure,
    "set and tuple": lambda net: lambda held=(frozenset({net}),): sample_through(next(iter(held[0]))),
    "partial": lambda net: functools.partial(sample_through, net),
    "handler": lambda net: poutine.mask(lambda: sample_through(net), mask=torch.tensor(True)),
}


@pytest.mark.parametrize("reach", REACHES)
def test_whatever_a_program_reaches_is_copied_and_the_original_left_alone(reach):
    net = nn.Linear(1, 1)
    program = REACHES[reach](net)
    before = state(net)
    frozen = freeze(program)
    pyro.set_rng_seed(0)
    first = frozen()
    assert_same_state(net, before)
    with torch.no_grad():
        net.weight.add_(3.0)
        net.bias.add_(3.0)
    pyro.set_rng_seed(0)
    assert torch.equal(frozen(), first)
    pyro.set_rng_seed(0)
    assert not torch.equal(program(), first)
    loss = SurrogateKD(["x"])
    assert loss.loss_and_grads(program, frozen) != 0
    assert net.weight.grad is not None or net.bias.grad is not None


@pytest.mark.parametrize("program", [global_model, UsesGlobal().model], ids=["function", "method"])
def test_globals_are_copied(program):
    frozen = freeze(program)
    pyro.set_rng_seed(0)
    first = frozen()
    with torch.no_grad():
        GLOBAL_NET.bias.add_(3.0)
    pyro.set_rng_seed(0)
    assert torch.equal(frozen(), first)
    assert GLOBAL_NET.training


class Static:
    """Reaches its net through its class, which is shared by every copy of its objects."""

    net = nn.Linear(1, 1)

    def model(self):
        return sample_through(type(self).net)


def test_parameters_that_cannot_be_copied_are_detected():
    program = Static().model
    with pytest.raises(SharedParameterError, match="both programs compute with it"):
        SurrogateKD(["x"])(program, freeze(program))()


def test_a_frozen_leaf_has_no_gradient():
    w, v = torch.tensor(1.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)

    def teacher():
        pyro.sample("x", dist.Normal(w, 1.0))
        return w

    frozen = freeze(teacher)
    value = frozen()
    assert not value.requires_grad
    SurrogateKD(["x"])(lambda: pyro.sample("x", dist.Normal(v, 1.0)), frozen)().backward()
    assert value.grad is None
    assert w.requires_grad


def test_results_of_computations_are_detached():
    w = torch.tensor(1.0, requires_grad=True)
    computed = w * 2

    def teacher():
        return pyro.sample("x", dist.Delta(computed))

    assert freeze(teacher)() == 2.0


def test_a_pyro_module_keeps_its_own_values():
    """Another PyroModule of the same names is in the store: freeze must not read its values."""

    class Loc(PyroModule):
        def __init__(self, loc):
            super().__init__()
            self.loc = PyroParam(torch.tensor(loc))

        def forward(self):
            return pyro.sample("x", dist.Normal(self.loc, 1.0))

    def with_context(module):
        with poutine.trace():
            return module()

    with_context(Loc(0.0))
    assert "loc" in pyro.get_param_store()
    frozen = freeze(Loc(7.0))
    assert poutine.trace(frozen).get_trace().nodes["x"]["fn"].loc == 7.0


def test_parameters_that_modules_load_from_the_store_are_copied():
    net = nn.Linear(1, 1)

    def model():
        pyro.module("net", net, update_module_params=True)
        return net(torch.ones(1))

    pyro.get_param_store()["net$$$weight"] = torch.tensor([[5.0]])
    pyro.get_param_store()["net$$$bias"] = torch.tensor([1.0])
    frozen = freeze(model)
    assert frozen() == 6.0
    assert frozen() == 6.0
    assert not frozen().requires_grad


def test_entries_of_the_store_are_copied():
    def model():
        return pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 1e-9))

    model()
    frozen = freeze(model)
    with torch.no_grad():
        pyro.get_param_store()._params["loc"].add_(10.0)
    assert round(frozen().item()) == 1


def test_global_modules_and_helpers_are_copied():
    namespace = {"pyro": pyro, "dist": dist, "torch": torch, "net": nn.Linear(1, 1)}
    source = "def helper(z):\n    return net(z)\ndef model():\n    return helper(pyro.sample('z', dist.Normal(torch.zeros(1), 1.)))"
    exec(source, namespace)
    model = namespace["model"]
    frozen = freeze(model)
    with torch.no_grad():
        namespace["net"].weight.fill_(0.0)
        namespace["net"].bias.fill_(7.0)
    assert model() == 7.0
    assert frozen() != 7.0


def test_shared_objects_stay_shared_in_the_copy():
    net = nn.Linear(1, 1)

    def one():
        return net.weight

    def both():
        return one() is net.weight

    assert freeze(both)()
