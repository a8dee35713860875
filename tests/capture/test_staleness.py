"""A captured loss is the eager one after a change of anything that the programs, the loss or an ELBO reach."""

import array
import dataclasses
import functools
import sys
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.testing import assert_close

from pyro_kd import LocalKD, SurrogateKD, divergences, freeze
from pyro_kd.training import CompiledELBO

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the student draws these outside"),  # dropout in train mode
    pytest.mark.filterwarnings("ignore:these are drawn outside of sample sites by a generator"),
]

FACTOR = 2.0
own = sys.modules[__name__]


def scaled(loc):
    return loc * FACTOR


@dataclasses.dataclass
class Settings:
    factor: float = 2.0


@dataclasses.dataclass(frozen=True)
class Fixed:
    factor: float = 2.0


class Slotted:
    __slots__ = ("factor",)

    def __init__(self):
        self.factor = 2.0


class Net(nn.Module):
    """A student with every kind of attribute that its loss depends on."""

    shared = 2.0

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.ones(3))
        self.register_parameter("shift", None)
        self.register_buffer("offset", None)
        self.number, self.items, self.table = 2.0, [2.0], {"factor": 2.0}
        self.settings, self.fixed, self.slotted = Settings(), Fixed(), Slotted()
        self.array, self.tensor, self.chosen = np.array([2.0]), torch.tensor(2.0), {"squared"}
        self.norm, self.dropout, self.activation = nn.BatchNorm1d(3), nn.Dropout(0.25), nn.LeakyReLU(0.25)
        nn.init.constant_(self.norm.weight, 1.5)
        self.weights = [nn.Parameter(torch.tensor(2.0))]
        self.function = scaled
        self.bound = functools.partial(torch.mul, torch.tensor(2.0))
        self.double()

    def forward(self, x):
        loc = self.bound(self.function(self.loc))
        factors = [self.number, self.items[0], self.table["factor"], self.settings.factor, self.fixed.factor]
        for factor in [*factors, self.slotted.factor, float(self.array[0]), self.tensor, self.shared, self.weights[0]]:
            loc = loc * factor
        if self.shift is not None:
            loc = loc + self.shift
        if self.offset is not None:
            loc = loc + self.offset
        if "squared" in self.chosen:
            loc = loc.square()
        loc = self.activation(self.dropout(loc * self.norm(x)))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(loc, 100.0).to_event(1))


def teacher(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(torch.zeros(3), 100.0).to_event(1))


def pair(student, teacher=teacher, loss=None, **options):
    loss = SurrogateKD(["y"]) if loss is None else loss
    eager, captured = loss(student, teacher), loss(student, teacher)
    captured.compile(backend=None, **options)
    return eager, captured


def values(modules, *args):
    found = []
    for module in modules:
        state = {name: value.clone() for name, value in module.state_dict().items()}
        pyro.set_rng_seed(1)
        found.append(module(*args).detach())
        module.load_state_dict(state, strict=False)  # what pyro.param makes in the call is not in it
    return found


def change_setting(net):
    net.settings.factor = 3.0


def change_class(net, monkeypatch):
    monkeypatch.setattr(Net, "shared", 3.0)


def change_global(net, monkeypatch):
    monkeypatch.setattr(own, "FACTOR", 3.0)


def change_forward(net, monkeypatch):
    forward = Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, x: forward(self, x.square()))


def change_array(net):
    net.array[0] = 3.0


CHANGES = {
    "a number": lambda net: setattr(net, "number", 3.0),
    "a list's item": lambda net: net.items.__setitem__(0, 3.0),
    "a list": lambda net: setattr(net, "items", [3.0]),
    "a dictionary's item": lambda net: net.table.update(factor=3.0),
    "a dataclass": change_setting,
    "another dataclass": lambda net: setattr(net, "settings", Settings(3.0)),
    "another frozen dataclass": lambda net: setattr(net, "fixed", Fixed(3.0)),
    "a slot": lambda net: setattr(net.slotted, "factor", 3.0),
    "an array's item": change_array,
    "an array": lambda net: setattr(net, "array", np.array([3.0])),
    "a tensor that is an attribute": lambda net: setattr(net, "tensor", torch.tensor(3.0)),
    "a set": lambda net: net.chosen.clear(),
    "an attribute over a class's": lambda net: setattr(net, "shared", 3.0),
    "a class's attribute": change_class,
    "a global": change_global,
    "a method": change_forward,
    "a function": lambda net: setattr(net, "function", torch.neg),
    "a partial": lambda net: setattr(net, "bound", functools.partial(torch.mul, torch.tensor(3.0))),
    "Dropout.p": lambda net: setattr(net.dropout, "p", 0.75),
    "BatchNorm.eps": lambda net: setattr(net.norm, "eps", 0.5),
    "LeakyReLU.negative_slope": lambda net: setattr(net.activation, "negative_slope", 0.5),
    "a parameter for none": lambda net: setattr(net, "shift", nn.Parameter(torch.ones(3).double())),
    "a buffer for none": lambda net: setattr(net, "offset", torch.ones(3)),
    "no parameter any more": lambda net: setattr(net.norm, "weight", None),
    "a parameter": lambda net: setattr(net, "loc", nn.Parameter(torch.tensor([3.0, 2.0, 1.0]).double())),
    "a parameter in a list": lambda net: net.weights.__setitem__(0, nn.Parameter(torch.tensor(3.0))),
    "a module": lambda net: setattr(net, "activation", nn.Tanh()),
    "a module's class": lambda net: setattr(net.activation, "__class__", nn.Tanh),
    "a forward hook": lambda net: net.norm.register_forward_hook(lambda module, args, output: output + 1),
    "a forward pre-hook": lambda net: net.activation.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "a parametrisation": lambda net: nn.utils.parametrize.register_parametrization(net, "loc", nn.Softplus()),
    "eval mode": lambda net: net.eval(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_the_student(change, monkeypatch):
    net, x = Net(), torch.randn(8, 3, dtype=torch.float64)
    modules = pair(net)
    before = values(modules, x)
    assert_close(*before)
    if change.__code__.co_argcount == 2:
        change(net, monkeypatch)
    else:
        change(net)
    after = values(modules, x)
    assert_close(*after)
    assert not torch.isclose(after[0], before[0], rtol=1e-5), "a change that matters"
    assert_close(*values(modules, x))


def test_momentum_of_batch_norm():
    net, x, averages = Net(), torch.randn(8, 3, dtype=torch.float64), []
    for module in pair(net):
        net.norm.reset_running_stats()
        for momentum in (0.1, 0.5, None):
            net.norm.momentum = momentum
            module(x)
        averages.append(net.norm.running_mean.clone())
    assert_close(*averages)


def test_equal_objects_need_no_other_graph():
    net, x = Net(), torch.randn(8, 3, dtype=torch.float64)
    _, captured = modules = pair(net)
    values(modules, x)
    for number in (1, 2):
        net.items, net.table, net.settings, net.number = [2.0], {"factor": 2.0}, Settings(), float(str(2.0 + 0 * number))
        assert_close(*values(modules, x))
    assert captured.loss._captured[0][1]._capture.num_graphs == 1
    net.settings.factor = 3.0
    assert_close(*values(modules, x))


def test_a_number_that_changes_in_each_step():
    """There are as many graphs as allowed, and then none; the loss is right all the time."""
    net, x, warned = Net(), torch.randn(8, 3, dtype=torch.float64), []
    modules = pair(net, max_graphs=2)
    for step in range(40):
        net.number = 1.0 + step / 10
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_close(*values(modules, x))
        warned += [text for text in map(str, (warning.message for warning in caught)) if "graph" in text]
    assert len(warned) == 1
    assert "2 graphs already" in warned[0]


def closure_number():
    factor = 2.0

    def student(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(factor * pyro.param("loc", torch.ones(3)), 1.0).to_event(1))

    def change():
        nonlocal factor
        factor = 3.0

    return student, change


def default_tensor():
    def student(x, *, shift=torch.zeros(3)):  # noqa: B008
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(shift + pyro.param("loc", torch.ones(3)), 1.0).to_event(1))

    return student, lambda: student.__kwdefaults__.update(shift=torch.ones(3))


def other_python_module():
    config = types.ModuleType("config_of_a_user")
    config.factor = 2.0
    sys.modules[config.__name__] = config
    namespace = {"config": config, "pyro": pyro, "dist": dist, "torch": torch, "__name__": "program_of_a_user"}
    code = (
        "def student(x):\n"
        "    with pyro.plate('rows', len(x)):\n"
        "        loc = config.factor * pyro.param('loc', torch.ones(3))\n"
        "        pyro.sample('y', dist.Normal(loc, 1.0).to_event(1))\n"
    )
    exec(code, namespace)
    return namespace["student"], lambda: setattr(config, "factor", 3.0)


def a_distribution_made_before():
    law = dist.Normal(torch.zeros(3), 1.0)

    def student(x):
        with pyro.plate("rows", len(x)):
            shift = law.mean
            pyro.sample("y", dist.Normal(shift + pyro.param("loc", torch.ones(3)), 1.0).to_event(1))

    return student, lambda: setattr(law, "loc", torch.ones(3))


def student_times(factor):
    def student(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(factor() * pyro.param("loc", torch.ones(3)), 1.0).to_event(1))

    return student


def settings_module():
    package, settings = types.ModuleType("package_of_a_user"), types.ModuleType("package_of_a_user.settings")
    package.settings, settings.factor = settings, 2.0
    sys.modules |= {package.__name__: package, settings.__name__: settings}
    return package


def a_python_module_that_is_imported_inside():
    package = settings_module()

    def factor():
        import package_of_a_user.settings as settings

        return settings.factor

    return student_times(factor), lambda: setattr(package.settings, "factor", 3.0)


def a_name_that_is_imported_inside():
    package = settings_module()

    def factor():
        from package_of_a_user.settings import factor

        return factor

    return student_times(factor), lambda: setattr(package.settings, "factor", 3.0)


def a_python_module_in_a_closure():
    package = settings_module()
    return student_times(lambda: package.settings.factor), lambda: setattr(package.settings, "factor", 3.0)


def code_that_is_loaded_again():
    def factor():
        return 2.0

    return student_times(factor), lambda: setattr(factor, "__code__", (lambda: 3.0).__code__)


def a_scalar_that_is_read():
    held = torch.tensor(2.0)
    return student_times(lambda: float(held)), lambda: held.fill_(3.0)


def a_scalar_that_decides():
    held = torch.tensor(True)
    return student_times(lambda: 2.0 if held else 3.0), lambda: held.fill_(False)


def a_byte():
    held = bytearray([2])
    return student_times(lambda: held[0]), lambda: held.__setitem__(0, 3)


def an_array_of_python():
    held = array.array("d", [2.0])
    return student_times(lambda: held[0]), lambda: held.__setitem__(0, 3.0)


def a_view_of_bytes():
    held = bytearray([2])
    view = memoryview(held)
    return student_times(lambda: view[0]), lambda: held.__setitem__(0, 3)


def a_read_only_dictionary():
    held = {"factor": 2.0}
    view = types.MappingProxyType(held)
    return student_times(lambda: view["factor"]), lambda: held.update(factor=3.0)


def a_recursive_function():
    class Walk:
        depth = 2

        def __call__(self, x):
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(self.down(pyro.param("loc", torch.ones(3)), self.depth), 1.0).to_event(1))

        def down(self, loc, depth):
            return loc if depth == 0 else self.down(2 * loc, depth - 1)

    walk = Walk()
    return walk, lambda: setattr(walk, "depth", 3)


@pytest.mark.parametrize(
    "make",
    [
        *(closure_number, default_tensor, other_python_module, a_distribution_made_before, a_recursive_function),
        *(a_python_module_that_is_imported_inside, a_name_that_is_imported_inside, a_python_module_in_a_closure),
        *(code_that_is_loaded_again, a_scalar_that_is_read, a_scalar_that_decides),
        *(a_byte, an_array_of_python, a_view_of_bytes, a_read_only_dictionary),
    ],
    ids=lambda make: make.__name__,
)
def test_a_change_in_what_a_function_reaches(make):
    student, change = make()
    modules, x = pair(student, freeze(teacher)), torch.randn(4, 3)
    before = values(modules, x)
    change()
    after = values(modules, x)
    assert_close(*before)
    assert_close(*after)
    assert not torch.isclose(before[0], after[0])


def test_an_argument_that_is_an_object():
    class Config:
        factor = 2.0

    def student(config):
        pyro.sample("y", dist.Normal(config.factor * pyro.param("loc", torch.ones(3)), 1.0).to_event(1))

    modules = pair(student, freeze(lambda config: pyro.sample("y", dist.Normal(torch.zeros(3), 1.0).to_event(1))))
    config = Config()
    before = values(modules, config)
    config.factor = 3.0
    after = values(modules, config)
    assert_close(*before)
    assert_close(*after)
    assert not torch.isclose(before[0], after[0])


def test_an_argument_that_equals_another():
    """A class may leave attributes out of its equality."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        name: str
        factor: float = dataclasses.field(compare=False)

    def student(config):
        pyro.sample("y", dist.Normal(config.factor * pyro.param("loc", torch.ones(3)), 1.0).to_event(1))

    modules = pair(student, freeze(lambda config: pyro.sample("y", dist.Normal(torch.zeros(3), 1.0).to_event(1))))
    before, after = values(modules, Config("one", 2.0)), values(modules, Config("one", 3.0))
    again = values(modules, Config("one", 3.0))
    assert_close(*before)
    assert_close(*after)
    assert_close(again, after)
    assert modules[1].loss._captured[0][1]._capture.num_graphs == 2


def test_a_hook_on_all_modules():
    modules, x = pair(Net()), torch.randn(8, 3, dtype=torch.float64)
    before = values(modules, x)
    hook = register_module_forward_hook(
        lambda module, args, output: 2 * output if isinstance(module, nn.LeakyReLU) else None
    )
    try:
        after = values(modules, x)
    finally:
        hook.remove()
    assert_close(*before)
    assert_close(*after)
    assert not torch.isclose(before[0], after[0])


# The teacher.


def linear(x, net, name="net"):
    pyro.module(name, net)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(net(x), 1.0).to_event(1))


def weights(value):
    return {"weight": torch.full((3, 3), value), "bias": torch.full((3,), value)}


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_other_tensors_of_a_teacher(is_frozen, backend):
    teacher_net = nn.Linear(3, 3)
    program = functools.partial(linear, net=teacher_net)
    if is_frozen:
        program = freeze(program)
        (teacher_net,) = program.modules_held
    pyro.clear_param_store()
    _, captured = modules = pair(functools.partial(linear, net=nn.Linear(3, 3), name="student"), program)
    captured.compile(backend=backend)
    x = torch.randn(4, 3)
    for step, assign in enumerate((False, True, True, False, True, False)):
        teacher_net.load_state_dict(weights(float(step)), assign=assign)
        assert_close(*values(modules, x))
    teacher_net.weight = nn.Parameter(torch.eye(3), requires_grad=is_frozen is False)
    assert_close(*values(modules, x))
    teacher_net.bias.data = torch.ones(3)
    assert_close(*values(modules, x))
    assert captured.loss._captured[0][1]._capture.num_graphs == 1, "a teacher that has moved becomes an input of the graph"


def test_a_write_that_leaves_no_trace_but_the_values(monkeypatch):
    """A long graph has a frozen teacher's matrices in another order, as copies."""
    monkeypatch.setattr("pyro_kd.capture.compile._LONGEST", 1)

    def program(net):
        def run():
            x = torch.arange(12.0).view(4, 3) / 12
            means = [nn.functional.linear(x + step, net.weight) for step in range(12)]
            pyro.sample("y", dist.Normal(torch.stack(means), 1.0).to_event(3))

        return run

    teacher = freeze(program(nn.Linear(3, 2)))
    _, captured = modules = pair(program(nn.Linear(3, 2)), teacher)
    captured.compile()
    before = values(modules)
    for tensor in teacher.tensors():
        tensor.data.add_(0.5)
    after = values(modules)
    assert_close(*before)
    assert_close(*after)
    assert not torch.isclose(before[0], after[0])


def test_a_teacher_in_another_mode():
    def program(x, net):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x), 1.0).to_event(1))

    frozen = freeze(functools.partial(program, net=nn.Sequential(nn.Linear(3, 3), nn.ELU(0.5))))
    modules, x = pair(functools.partial(program, net=nn.Linear(3, 3)), frozen), torch.randn(4, 3)
    before = values(modules, x)
    next(module for module in frozen.modules_held if isinstance(module, nn.ELU)).alpha = 2.0
    after = values(modules, x)
    assert_close(*after)
    assert not torch.isclose(before[0], after[0])


# Losses and ELBOs.


class Curriculum(SurrogateKD):
    """Values of the teacher at first, its noise later; with options of its own, private ones too."""

    strength = 1.0

    def __init__(self, targets):
        super().__init__(targets)
        self._is_local = True
        self._options = {"strengths": [1.0]}

    def given_sites(self, teacher, targets):
        return list(teacher) if self._is_local else targets

    def _run_terms(self, run, **options):
        terms = super()._run_terms(run, **options)
        return [term._replace(value=term.value * self.strength * self._options["strengths"][0]) for term in terms]


def chain(loc):
    def model():
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5))

    return model


def differentiable_chain():
    loc = torch.tensor(1.0, requires_grad=True)
    return chain(loc), chain(torch.tensor(0.0))


def test_private_options_of_a_loss(monkeypatch):
    eager, captured = pair(*differentiable_chain(), Curriculum(["y"]))
    changes = [
        lambda loss: setattr(loss, "_is_local", False),
        lambda loss: loss._options["strengths"].__setitem__(0, 2.0),
        lambda loss: setattr(loss, "strength", 3.0),
        lambda loss: setattr(loss, "_is_local", True),
    ]
    seen = []
    for change in [lambda loss: None, *changes]:
        change(eager.loss)
        change(captured.loss)
        found = [module().item() for module in (eager, captured)]
        assert found[0] == pytest.approx(found[1])
        seen.append(found[0])
    assert len(set(seen)) == 5


def test_what_a_divergence_and_a_weight_reach():
    scale = {"kl": 1.0, "weight": 1.0}

    def divergence(p, q, value):
        return scale["kl"] * divergences.kl(p, q, value)

    loss = LocalKD(["y"], divergence=divergence, latent_divergence=divergence, latent_weight=lambda name: scale["weight"])
    modules = pair(*differentiable_chain(), loss)
    seen = []
    for change in ({}, {"kl": 2.0}, {"weight": 3.0}):
        scale.update(change)
        found = [module().item() for module in modules]
        assert found[0] == pytest.approx(found[1])
        seen.append(found[0])
    assert len(set(seen)) == 3


class Tempered(Trace_ELBO):
    """Options of its own, nested ones too."""

    def __init__(self):
        super().__init__()
        self.temperature, self._schedule = 1.0, types.SimpleNamespace(factor=1.0)

    def differentiable_loss(self, model, guide, *args, **kwargs):
        return super().differentiable_loss(model, guide, *args, **kwargs) * self.temperature * self._schedule.factor


def elbo_changes():
    tempered, nested, renyi, particles = Tempered(), Tempered(), RenyiELBO(0.5, num_particles=2), Trace_ELBO()
    return {
        "temperature": (tempered, lambda: setattr(tempered, "temperature", 3.0)),
        "nested": (nested, lambda: setattr(nested._schedule, "factor", 3.0)),
        "alpha": (renyi, lambda: setattr(renyi, "alpha", 0.25)),
        "num_particles": (particles, lambda: setattr(particles, "num_particles", 3)),
    }


class LossOfRenyi:
    """Pyro's RenyiELBO has no ``differentiable_loss``: its bound, from the log weights of two particles."""

    def __init__(self, elbo):
        self.elbo = elbo

    def differentiable_loss(self, model, guide, *args, **kwargs):
        weights = []
        for _ in range(self.elbo.num_particles):
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
            weights.append(model_trace.log_prob_sum() - guide_trace.log_prob_sum())
        scaled = (1 - self.elbo.alpha) * torch.stack(weights)
        return -scaled.logsumexp(0) / (1 - self.elbo.alpha)


@pytest.mark.parametrize("name", elbo_changes())
def test_options_of_an_elbo(name):
    elbo, change = elbo_changes()[name]
    loss = LossOfRenyi(elbo) if isinstance(elbo, RenyiELBO) else elbo

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 0.5))

    captured, seen = CompiledELBO(loss, model, guide, backend=None), []
    for step in (lambda: None, change):
        step()
        found = []
        for function in (captured, lambda: loss.differentiable_loss(model, guide)):
            pyro.set_rng_seed(0)
            found.append(function().item())
        assert found[0] == pytest.approx(found[1])
        seen.append(found[0])
    assert seen[0] != seen[1]


# What programs change themselves.


class Annealed(nn.Module):
    """Counts its runs, and depends on the count or not."""

    def __init__(self, rate):
        super().__init__()
        self.loc, self.runs, self.rate = nn.Parameter(torch.ones(3)), 0, rate
        self.history = []

    def forward(self):
        self.runs += 1
        self.history.append(self.runs)
        factor = 1.0 + self.rate * self.runs if self.rate else 1.0
        pyro.sample("y", dist.Normal(factor * self.loc, 1.0).to_event(1))


def standard():
    pyro.sample("y", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def test_a_program_that_counts_its_runs_has_a_graph():
    eager, captured = pair(Annealed(0.0), standard)
    for _ in range(3):
        assert_close(captured(), eager())
    assert captured.loss._captured[0][1]._capture.num_graphs == 1


def test_a_program_that_depends_on_its_count_has_none():
    student = Annealed(0.1)
    _, captured = pair(student, standard)
    with pytest.warns(UserWarning, match=r"differs from run to run: .* what they change themselves \(.*runs"):
        captured()
    for _ in range(3):
        value = captured()
        assert_close(value.detach(), 1.5 * torch.tensor((1.0 + 0.1 * student.runs) ** 2))


@pytest.mark.parametrize("draw", [lambda: np.random.rand(), lambda: __import__("random").random()], ids=["numpy", "python"])
def test_a_loss_with_random_numbers_of_others_has_no_graph(draw):
    loc = torch.ones(3, requires_grad=True)
    captured = SurrogateKD(["y"])(lambda: pyro.sample("y", dist.Normal(draw() * loc, 1.0).to_event(1)), standard)
    captured.compile(backend=None)
    with (
        pytest.warns(UserWarning, match="cannot be shared"),
        pytest.warns(UserWarning, match="random numbers of Python or NumPy"),
    ):
        captured()
    assert len({captured().item() for _ in range(4)}) == 4
