"""Networks that are compiled, scripted, or draw masks, inside of a captured loss; and the line where a capture stops."""

import importlib
import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_kd import freeze
from pyro_kd.capture.passes.bernoulli import draw_uniformly
from tests.support.losses import SurrogateKD

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the student draws these outside"),  # dropout in train mode
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


def layers(*more):
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), *more)


def compiled_function(net):
    module = nn.Module()
    module.net, function = net, torch.compile(net.forward, backend="eager")
    module.forward = lambda x: function(x)
    return module


KINDS = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "a compiled function": compiled_function,
    "compiled in place": lambda net: net.compile(backend="eager") or net,
    "scripted": torch.jit.script,
    "traced": lambda net: torch.jit.trace(net, torch.randn(4, 2)),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_network_that_is_compiled_already_is_captured(make):
    def program(net):
        def model(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(net(x), 1.0).to_event(1))

        return model

    plain, x = layers(), torch.randn(4, 2)
    with pyro.validation_enabled():  # torch.compile turns it off for good
        net = make(plain)
    teacher, student = freeze(program(layers())), program(net)
    eager, captured = SurrogateKD(["y"])(program(plain), teacher), SurrogateKD(["y"])(student, teacher)
    captured.compile(backend=None)
    for _ in range(3):
        found = []
        for module in (eager, captured):
            plain.zero_grad()
            value = module(x)
            value.backward()
            found.append([value.detach(), *(param.grad.clone() for param in plain.parameters())])
        assert_close(*found)
        with torch.no_grad():
            for param in plain.parameters():
                param.mul_(1.1)
    assert captured.loss._pairs._pairs[0].captured._capture.num_graphs == 1


def test_a_scripted_network_has_a_graph_for_each_mode():
    net, x = torch.jit.script(layers(nn.BatchNorm1d(3))), torch.randn(4, 2)

    def student(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x), 1.0).to_event(1))

    eager, captured = SurrogateKD(["y"])(student, freeze(student)), SurrogateKD(["y"])(student, freeze(student))
    with torch.no_grad():
        for param in net.parameters():
            param.add_(0.5)
    captured.compile(backend=None)
    for is_training in (True, False, True, False):
        net.train(is_training)
        found = []
        for module in (eager, captured):
            state = {name: value.clone() for name, value in net.state_dict().items()}
            found.append([module(x).detach(), *(buffer.clone() for buffer in net.buffers())])
            net.load_state_dict(state)
        assert_close(*found)


def test_a_frozen_scripted_network_needs_no_mode():
    net, weight, x = (
        torch.jit.freeze(torch.jit.script(layers()).eval()),
        torch.ones(3, requires_grad=True),
        torch.randn(4, 2),
    )

    def student(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(weight * net(x), 1.0).to_event(1))

    eager, captured = SurrogateKD(["y"])(student, freeze(student)), SurrogateKD(["y"])(student, freeze(student))
    captured.compile(backend=None)
    with torch.no_grad():
        weight.mul_(2)
    assert_close(captured(x), eager(x))
    assert captured.loss._pairs._pairs[0].captured._capture.num_graphs == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_parts_of_a_teacher_that_is_not_frozen_are_captured(backend):
    """A hook on all modules guards its modes meanwhile, which torch neither compiles nor warns of."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(layers(nn.BatchNorm1d(3)), backend=backend)

        def forward(self, x):
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(self.net(x), 1.0).to_event(1))

    x = torch.randn(4, 2)
    with pyro.validation_enabled():  # torch.compile turns it off for good
        student, teacher = Model(), Model()
        teacher.load_state_dict(student.state_dict())
        student.eval()
        assert SurrogateKD(["y"])(student, teacher)(x) == 0
        assert SurrogateKD(["y"])(student, freeze(teacher))(x) == 0


def test_the_derivative_of_an_energy_has_a_graph():
    """Its last bias has no part in the loss."""

    class Score(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = layers(nn.Linear(3, 1))

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (score,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(score, 1.0).to_event(1))

    student, teacher, x = Score(), freeze(Score()), torch.randn(4, 2)
    eager, captured = SurrogateKD(["y"])(student, teacher), SurrogateKD(["y"])(student, teacher)
    captured.compile(backend=None)
    found = []
    for module in (eager, captured):
        student.zero_grad()
        value = module(x)
        value.backward()
        found.append([value.detach(), *(param.grad for param in student.parameters())])
    assert found[0][-1] is found[1][-1] is None
    assert_close(found[0][:-1], found[1][:-1])
    assert captured.loss._pairs._pairs[0].captured._capture.num_graphs == 1


PACKAGE = """import pyro
import pyro.distributions as dist


def by_value(weight, x):
    if x.sum() > 0:
        weight = weight + 1
    pyro.sample("y", dist.Normal(weight * x, 1.0).to_event(1))


def by_shape(weight, x):
    x = x[x > 0]
    pyro.sample("y", dist.Normal(weight * x, 1.0).to_event(1))
"""


@pytest.mark.parametrize(("name", "line"), [("by_value", 6), ("by_shape", 12)])
@pytest.mark.parametrize("folder", ["site-packages", "dist-packages", "torch_models"])
def test_a_refusal_names_the_line_in_an_installed_package(name, line, folder, tmp_path, monkeypatch):
    packages = tmp_path / folder
    packages.mkdir()
    (packages / "installed_models.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(packages))
    installed = importlib.import_module("installed_models")
    monkeypatch.delitem(sys.modules, "installed_models")
    weight = torch.zeros((), requires_grad=True)
    run = getattr(installed, name)
    module = SurrogateKD(["y"])(lambda x: run(weight, x), freeze(lambda x: run(torch.ones(()), x)))
    module.compile(backend=None)
    with pytest.warns(UserWarning, match=rf"installed_models\.py:{line} \(.+\)"):
        module(torch.ones(3))


def noisy(net):
    def student(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1))

    return student


def constant(rows):
    with pyro.plate("rows", rows):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., :1] * torch.ones(3), 0.5).to_event(1))


def test_dropout_of_inductor_has_the_law_of_the_eager_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3))
    eager, captured = SurrogateKD(["x"])(noisy(net), constant), SurrogateKD(["x"])(noisy(net), constant)
    captured.compile()
    draws = [torch.tensor([module(64).item() for _ in range(200)]) for module in (eager, captured)]
    assert draws[1].isfinite().all()
    assert len(set(draws[1].tolist())) == 200
    for statistic in (lambda values: values, lambda values: (values - values.mean()).square()):  # mean and variance
        samples = [statistic(values) for values in draws]
        error = math.sqrt(sum(values.var().item() / len(values) for values in samples))
        assert abs(samples[0].mean() - samples[1].mean()) < 5 * error


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.empty_like(x).bernoulli_(0.3),
        lambda x: torch.empty_like(x).bernoulli_(0.3 * torch.ones_like(x)),
        lambda x: torch.bernoulli(0.3 * torch.ones_like(x)),
        lambda x: torch.bernoulli(x, 0.3),
        lambda x: torch.empty_like(x, dtype=torch.int64).bernoulli_(0.3),
        lambda x: torch.empty_like(x, dtype=torch.bool).bernoulli_(0.3),
        lambda x: torch.empty_like(x, dtype=torch.float64).bernoulli_(0.3),
    ],
    ids=["in place", "in place, of probabilities", "of probabilities", "of a number", "integers", "booleans", "doubles"],
)
def test_rewritten_bernoulli_draws_have_the_right_probability(draw):
    x = torch.zeros(10_000)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: draw(x) + 0 * x.to(draw(x).dtype))(x)
    draw_uniformly(graph)
    assert not any("bernoulli" in str(node.target) for node in graph.graph.nodes)
    value = graph(x)
    assert value.dtype == draw(x).dtype or value.dtype == torch.int64
    assert set(value.unique().tolist()) == {0, 1}
    assert abs(value.double().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 10_000)
