"""Where the parameters of a program live: Bayesian networks, PyroModule, PyroSample, pyro.param."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam, PyroSample, pyro_method
from pyro.nn.module import to_pyro_module_
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints

from pyro_kd import LocalKD, freeze
from pyro_kd.errors import SharedParameterError
from tests.support.inputs import X
from tests.support.loss_options import both, particles
from tests.support.losses import SurrogateKD
from tests.support.runs import only_run, values_of


@pytest.fixture(params=[False, True], ids=["global store", "module_local_params"])
def local_params(request):
    with pyro.settings.context(module_local_params=request.param):
        yield request.param


# Bayesian networks.


class BayesianLinear(PyroModule):
    """Weight and bias are draws around loc; the scale is a parameter that is made at its first use."""

    def __init__(self, loc, scale=2.0):
        super().__init__()
        self.body = PyroModule[nn.Sequential](PyroModule[nn.Linear](2, 1))
        self.body[0].weight = PyroSample(dist.Normal(loc, 1.0).expand([1, 2]).to_event(2))
        self.body[0].bias = PyroSample(lambda module: dist.Normal(loc, module.spread).expand([1]).to_event(1))
        self.body[0].spread = 0.5
        self.scale = PyroParam(lambda: torch.tensor(scale), constraint=constraints.positive)

    def forward(self, x):
        mean = self.body(x).squeeze(-1)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, self.scale))


@both
def test_a_bayesian_network(loss, local_params):
    """KL of the priors; with shared noise the student's weights are the teacher's shifted by 1; d/d log s of the target's KL."""
    student, teacher = BayesianLinear(1.0), BayesianLinear(0.0)
    frozen = freeze(teacher)
    terms = loss(["y"]).terms(student, frozen, X)
    shift = {SurrogateKD: X.sum(-1) + 1, LocalKD: torch.zeros(3)}[loss]
    target = float((shift.square() / (2 * 4)).sum())
    expected = {"body.0.weight": 1.0, "body.0.bias": 1 / (2 * 0.25), "y": target}
    assert values_of(terms) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    loss(["y"])(student, frozen)(X).backward()
    unconstrained = student.scale_unconstrained
    assert float(unconstrained.grad) == pytest.approx(3 - float(3 + shift.square().sum() / 4), abs=1e-5)
    assert list(pyro.get_param_store()) == [] if local_params else ["scale"]


@both
def test_a_network_made_bayesian(loss):
    """to_pyro_module_ and a PyroSample for every parameter: the terms are sums over the entries."""

    def program(loc):
        net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        to_pyro_module_(net)
        for module in net:
            for name, value in list(module.named_parameters()):
                setattr(module, name, PyroSample(dist.Normal(loc, 1.0).expand(value.shape).to_event(value.dim())))

        def model(x):
            mean = net(x).squeeze(-1)
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0))

        return model

    student, teacher = program(1.0), program(0.0)
    terms = values_of(loss(["y"]).terms(student, freeze(teacher), X))
    latents = {"0.weight": 3.0, "0.bias": 1.5, "1.weight": 1.5, "1.bias": 0.5}
    assert {name: terms[name] for name in latents} == pytest.approx(latents)
    run = only_run(loss(["y"]), student, teacher, X)
    shift = {SurrogateKD: 1.0, LocalKD: 0.0}[loss]
    for pair in run.pairs[:4]:
        assert torch.allclose(pair.student_value, pair.value + shift, atol=1e-6)


@both
def test_learned_priors_of_a_bayesian_network(loss):
    """Parameters of the prior are found by training on the latent terms."""

    class Learned(PyroModule):
        def __init__(self, loc, spread):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(loc))
            self.spread = PyroParam(torch.tensor(spread), constraint=constraints.positive)
            self.w = PyroSample(lambda self: dist.Normal(self.loc, self.spread))

        def forward(self, x):
            w = self.w
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(w * x.sum(-1), 1.0))

    teacher = freeze(Learned(2.0, 0.3))
    pyro.clear_param_store()
    student = Learned(0.0, 1.0)
    svi = SVI(student, teacher, Adam({"lr": 0.03}), loss(["y"], latent_weight=1.0))
    for _ in range(400):
        svi.step(X)
    assert student.loc.item() == pytest.approx(2.0, abs=0.05)
    assert student.spread.item() == pytest.approx(0.3, abs=0.05)


# PyroModules: nested, with methods, and with parameters of their own.


class Leaf(PyroModule):
    def __init__(self, mean, scale):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.scale = PyroParam(torch.tensor(scale), constraint=constraints.positive)

    @pyro_method
    def draw(self):
        return pyro.sample("x", dist.Normal(self.mean, self.scale))


class Nested(PyroModule):
    def __init__(self, mean, scale):
        super().__init__()
        self.inner = PyroModule()
        self.inner.leaf = Leaf(mean, scale)

    def forward(self):
        return self.inner.leaf.draw()

    @pyro_method
    def model(self):
        return self.inner.leaf.draw()


def gaussian_gradients(mean, scale):
    """Of KL(N(0, 1) || N(mean, scale^2)) by the mean and by the logarithm of the scale."""
    return mean / scale**2, 1 - (1 + mean**2) / scale**2


@pytest.mark.parametrize("call", [lambda module: module, lambda module: module.model], ids=["forward", "method"])
@both
@particles
def test_nested_modules_have_the_gradient_by_hand(loss, options, call, local_params):
    student, teacher = Nested(1.5, 2.0), Nested(0.0, 1.0)
    frozen = freeze(call(teacher))
    value = loss(["x"], **options).loss_and_grads(call(student), frozen)
    assert value == pytest.approx(math.log(2.0) + (1 + 1.5**2) / 8 - 0.5)
    by_mean, by_log_scale = gaussian_gradients(1.5, 2.0)
    assert float(student.inner.leaf.mean.grad) == pytest.approx(by_mean)
    assert float(student.inner.leaf.scale_unconstrained.grad) == pytest.approx(by_log_scale)
    assert all(p.grad is None for p in teacher.parameters())


@both
def test_modules_of_the_same_names_with_local_parameters(loss):
    """With module_local_params nothing is in the global store: the teacher need not be frozen. Pyro's SVI takes no
    nn.Parameter then, whatever the loss, so torch trains."""
    with pyro.settings.context(module_local_params=True):
        student, teacher = Nested(1.5, 2.0), Nested(0.0, 1.0)
        module = loss(["x"])(student, teacher)
        optim = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(300):
            optim.zero_grad()
            module().backward()
            optim.step()
        assert len(pyro.get_param_store()) == 0
        assert student.inner.leaf.mean.item() == pytest.approx(0.0, abs=0.02)
        assert student.inner.leaf.scale.item() == pytest.approx(1.0, abs=0.02)
        assert teacher.inner.leaf.mean.item() == 0.0
        assert teacher.inner.leaf.scale.item() == 1.0


@both
def test_modules_of_the_same_names_in_the_global_store(loss):
    student, teacher = Nested(1.5, 2.0), Nested(0.0, 1.0)
    with pytest.raises(
        SharedParameterError, match=r"inner\.leaf\.scale.*belongs to both|inner\.leaf\.mean.*belongs to both"
    ):
        loss(["x"]).loss_and_grads(student, teacher)


@both
def test_svi_trains_local_parameters(loss):
    class Local(PyroModule):
        def __init__(self, mean):
            super().__init__()
            self.mean = PyroParam(torch.tensor(mean))

        def forward(self):
            return pyro.sample("x", dist.Normal(self.mean, 1.0))

    with pyro.settings.context(module_local_params=True):
        student, teacher = Local(1.5), Local(0.5)
        svi = SVI(student, teacher, Adam({"lr": 0.05}), loss(["x"]))
        for _ in range(200):
            svi.step()
        assert student.mean.item() == pytest.approx(0.5, abs=0.02)
        assert teacher.mean.item() == 0.5
        assert len(pyro.get_param_store()) == 0


# pyro.param.


def parametrised(mean, scale):
    def model():
        m = pyro.param("mean", mean)
        s = pyro.param("scale", scale, constraint=constraints.positive)
        pyro.sample("x", dist.Normal(m, s))

    return model


PARAMETERS = {
    "tensors": lambda: parametrised(torch.tensor(1.5), torch.tensor(2.0)),
    "made at the first use": lambda: parametrised(lambda: torch.tensor(1.5), lambda: torch.tensor(2.0)),
}


@pytest.mark.parametrize("make", PARAMETERS)
@both
@particles
def test_parameters_have_the_gradient_by_hand(loss, options, make):
    def teacher():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    value = loss(["x"], **options).loss_and_grads(PARAMETERS[make](), teacher)
    assert value == pytest.approx(math.log(2.0) + (1 + 1.5**2) / 8 - 0.5)
    gradients = [float(pyro.param(name).unconstrained().grad) for name in ("mean", "scale")]
    assert gradients == pytest.approx(gaussian_gradients(1.5, 2.0))


@both
def test_parameters_made_at_the_first_use_are_made_once(loss):
    made = []

    def make():
        made.append(1)
        return torch.randn(3)

    def student():
        pyro.sample("x", dist.Normal(pyro.param("loc", make), 1.0).to_event(1))

    def teacher():
        pyro.sample("x", dist.Normal(torch.full((3,), 5.0), 1.0).to_event(1))

    svi = SVI(student, teacher, Adam({"lr": 0.1}), loss(["x"]))
    for _ in range(200):
        svi.step()
    assert len(made) == 1
    assert torch.allclose(pyro.param("loc"), torch.full((3,), 5.0), atol=0.05)


def test_simplex_cholesky_and_interval_constraints_hold_while_training():
    """The KL goes to 0, and every value satisfies its constraint."""

    def program(probs, tril, rate):
        def model():
            p = pyro.param("probs", probs, constraint=constraints.simplex)
            factor = pyro.param("tril", tril, constraint=constraints.lower_cholesky)
            r = pyro.param("rate", rate, constraint=constraints.unit_interval)
            pyro.sample("k", dist.Categorical(p))
            pyro.sample("x", dist.Normal(factor, 0.5).to_event(2))
            pyro.sample("b", dist.Bernoulli(r))

        return model

    teacher = program(torch.tensor([0.7, 0.2, 0.1]), torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor(0.9))
    teacher()
    frozen = freeze(teacher)
    pyro.clear_param_store()
    student = program(torch.full((3,), 1 / 3), torch.eye(2), torch.tensor(0.5))
    svi = SVI(student, frozen, Adam({"lr": 0.05}), SurrogateKD(["k", "x", "b"]))
    values = [svi.step() for _ in range(300)]
    assert values[0] > 0.5
    assert values[-1] < 1e-3
    assert torch.allclose(pyro.param("probs"), torch.tensor([0.7, 0.2, 0.1]), atol=0.02)
    assert torch.allclose(pyro.param("tril"), torch.tensor([[1.0, 0.0], [0.5, 0.5]]), atol=0.03)
    assert pyro.param("rate").item() == pytest.approx(0.9, abs=0.02)
