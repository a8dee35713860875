"""Where a program's parameters live, and what a program may be: modules, PyroModule, PyroSample, pyro.param, callables."""

import functools
import math
from types import SimpleNamespace

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

from pyro_kd import LocalKD, SurrogateKD, freeze
from pyro_kd.errors import SharedParameterError
from tests.support.runs import only_run

both = pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
particles = pytest.mark.parametrize(
    "options",
    [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}],
    ids=["one", "loop", "vectorized"],
)
X = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]])


@pytest.fixture(params=[False, True], ids=["global store", "module_local_params"])
def local_params(request):
    with pyro.settings.context(module_local_params=request.param):
        yield request.param


def values_of(terms):
    return {name: float(term.value.detach()) for name, term in terms.items()}


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


def test_constraints_of_other_spaces_hold_while_training():
    """A simplex, a Cholesky factor and an interval: the KL goes to 0, and every value stays where it must be."""

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


# Layers that are initialised by their first input, that draw, or that keep statistics.


class Net(nn.Module):
    """y ~ N(net(x), 1)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        mean = self.net(x).squeeze(-1)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0))


def sum_of_columns(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x.sum(-1), 1.0))


@both
@particles
def test_a_lazy_layer_of_the_student(loss, options):
    student = Net(nn.LazyLinear(1))
    module = loss(["y"], **options)(student, sum_of_columns)
    value = module(X)
    value.backward()
    weight, bias = student.net.weight, student.net.bias
    residual = (X @ weight.detach().T + bias.detach()).squeeze(-1) - X.sum(-1)
    assert float(value.detach()) == pytest.approx(float(residual.square().sum() / 2), rel=1e-5)
    assert torch.allclose(weight.grad, (residual @ X)[None], atol=1e-5)


@both
def test_a_lazy_layer_of_the_teacher(loss):
    """Initialised by the first run of an unfrozen teacher; then it can be frozen."""
    teacher = Net(nn.LazyLinear(1))
    student = Net(nn.Linear(2, 1))
    value = loss(["y"]).loss(student, teacher, X)
    assert loss(["y"]).loss(student, freeze(teacher), X) == pytest.approx(value)


@both
@particles
@pytest.mark.filterwarnings("ignore:the student draws these outside")
def test_dropout_of_the_student_is_its_own(loss, options):
    """Of ones: 0 or 2 in training, against the teacher's 1, so 1/2 for each row whatever is drawn; and 1 in evaluation."""
    student, teacher = Net(nn.Dropout(0.5)), Net(nn.Dropout(0.5))
    module = loss(["y"], **options)(student, teacher)
    ones = torch.ones(64, 1, requires_grad=True)
    assert teacher.training
    assert float(module(ones).detach()) == pytest.approx(32.0)
    assert teacher.training
    module.eval()
    assert float(module(ones).detach()) == 0.0
    frozen = freeze(teacher)
    module = loss(["y"], **options)(student.train(), frozen)
    assert float(module(ones).detach()) == pytest.approx(32.0)


@pytest.mark.parametrize(
    ("options", "runs"),
    [({}, 1), ({"num_particles": 3}, 3), ({"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2}, 1)],
    ids=["one", "loop", "vectorized"],
)
@both
def test_batch_statistics_move_with_each_run_of_the_student_alone(loss, options, runs):
    norms = [nn.BatchNorm1d(1, affine=False) for _ in range(2)]
    student, teacher = (Net(nn.Sequential(nn.Linear(2, 1), norm)) for norm in norms)
    loss(["y"], **options)(student, teacher)(X)
    assert [int(norm.num_batches_tracked) for norm in norms] == [runs, 0]
    assert torch.equal(norms[1].running_mean, torch.zeros(1))
    mean = student.net[0](X).mean(0)
    expected = mean * (1 - 0.9**runs)
    assert torch.allclose(norms[0].running_mean, expected.detach(), atol=1e-6)


# Gradient modes.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@both
@particles
def test_the_loss_without_gradients(loss, options, mode):
    """The same number, for the same noise; and training goes on afterwards."""
    student, frozen = Net(nn.Linear(2, 1)), freeze(Net(nn.Linear(2, 1)))
    module = loss(["y"], **options)(student, frozen)
    with mode():
        value = module(X)
        assert not value.requires_grad
        assert loss(["y"], **options).loss(student, frozen, X) == pytest.approx(float(value))
    trained = module(X)
    assert float(trained.detach()) == pytest.approx(float(value))
    trained.backward()
    assert student.net.weight.grad.abs().sum() > 0


def test_inputs_made_in_inference_mode():
    with torch.inference_mode():
        x = X * 2
    value = SurrogateKD(["y"]).loss(Net(nn.Linear(2, 1)), freeze(sum_of_columns), x)
    assert value > 0
    loc = torch.tensor(1.0, requires_grad=True)

    def shifted(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x.sum(-1) + loc, 1.0))

    SurrogateKD(["y"])(shifted, freeze(sum_of_columns))(x).backward()
    assert float(loc.grad) == pytest.approx(3.0)


def test_a_teacher_frozen_in_inference_mode():
    teacher, student = Net(nn.Linear(2, 1)), Net(nn.Linear(2, 1))
    with torch.inference_mode():
        frozen = freeze(teacher)
    SurrogateKD(["y"])(student, frozen)(X).backward()
    assert student.net.weight.grad.abs().sum() > 0


# What a program may be. Each factory makes one of y ~ N(loc sum(x), 1), called with x.


def linear(x, loc):
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(loc * x.sum(-1), 1.0))


class Holder:
    loc = None

    def __init__(self, loc):
        self.value = loc

    def model(self, x):
        return linear(x, self.value)

    def __call__(self, x):
        return linear(x, self.value)

    @classmethod
    def by_class(cls, x):
        return linear(x, cls.loc)

    @staticmethod
    def by_nothing(x, loc):
        return linear(x, loc)


class HolderModule(nn.Module):
    def __init__(self, loc):
        super().__init__()
        self.loc = nn.Parameter(loc.detach().clone())

    def forward(self, x):
        return linear(x, self.loc)

    def model(self, x):
        return linear(x, self.loc)


def a_closure(loc):
    def model(x):
        return linear(x, loc)

    return model


def a_class_method(loc):
    return type("Fixed", (Holder,), {"loc": loc}).by_class


def nested_functions(loc):
    def model(x):
        def inner():
            return linear(x, loc)

        return inner()

    return model


def a_recursion(loc):
    def model(x, depth=3):
        return model(x, depth - 1) if depth else linear(x, loc)

    return model


def a_decorated_function(loc):
    @functools.wraps(linear)
    def model(x):
        return linear(x, loc)

    return model


CALLABLES = {
    "closure": a_closure,
    "lambda": lambda loc: lambda x: linear(x, loc),
    "partial by keyword": lambda loc: functools.partial(linear, loc=loc),
    "partial of a partial": lambda loc: functools.partial(functools.partial(linear, loc=torch.tensor(9.0)), loc=loc),
    "default argument": lambda loc: lambda x, loc=loc: linear(x, loc),
    "bound method": lambda loc: Holder(loc).model,
    "class method": a_class_method,
    "static method in a partial": lambda loc: functools.partial(Holder.by_nothing, loc=loc),
    "callable object": Holder,
    "method of an object of functions": lambda loc: SimpleNamespace(model=lambda x: linear(x, loc)).model,
    "module": HolderModule,
    "method of a module": lambda loc: HolderModule(loc).model,
    "module in eval mode": lambda loc: HolderModule(loc).eval(),
    "sequential of one": lambda loc: nn.Sequential(HolderModule(loc)),
    "nested functions": nested_functions,
    "recursion": a_recursion,
    "decorated": a_decorated_function,
}


@pytest.mark.parametrize("teachers", CALLABLES)
@both
def test_every_kind_of_callable_as_teacher(loss, teachers):
    expected = float(X.sum(-1).square().sum() / 2)
    student, teacher = a_closure(torch.tensor(1.0)), CALLABLES[teachers](torch.tensor(0.0))
    assert loss(["y"]).loss(student, teacher, X) == pytest.approx(expected)
    assert loss(["y"]).loss(student, freeze(teacher), X) == pytest.approx(expected)


@pytest.mark.parametrize("students", CALLABLES)
@both
def test_every_kind_of_callable_as_student(loss, students):
    loc = torch.tensor(1.0, requires_grad=True)
    student = CALLABLES[students](loc)
    module = loss(["y"])(student, freeze(a_closure(torch.tensor(0.0))))
    (parameter,) = list(module.parameters()) or [loc]
    module(X).backward()
    assert float(parameter.grad) == pytest.approx(float(X.sum(-1).square().sum()))


@both
@particles
def test_arguments_of_any_kind(loss, options):
    """Positional, by keyword, with defaults, variable, and containers of tensors; shapes may change between the calls."""

    def program(loc):
        def model(x, *more, weights, shift=0.0, **named):
            total = x["a"] + sum(more) + weights[0] + named["bonus"]
            with pyro.plate("rows", len(total)):
                pyro.sample("y", dist.Normal(loc * total + shift, 1.0))

        return model

    objective = loss(["y"], **options)
    for rows in (2, 5):
        one = torch.ones(rows)
        value = objective.loss(program(1.0), program(0.0), {"a": one}, one, 2 * one, weights=(one,), bonus=3.0)
        assert value == pytest.approx(rows * 8.0**2 / 2)
