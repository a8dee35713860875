"""freeze and evaluation_mode: the teacher has parameters of its own, and nothing of it moves."""

import collections
import copy
import functools
import io
import itertools
import pickle
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints

from pyro_kd import LocalKD, SurrogateKD, freeze
from pyro_kd.errors import InvalidProgramError, NoParametersError, SharedParameterError
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.isolation.programs import owners

pytestmark = pytest.mark.filterwarnings("ignore:the student draws these outside")  # dropout in train mode


def decoder(width=4):
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 3))


def function_model(net):
    """A plain function with pyro.module, pyro.param and a closure."""

    def model(n=6):
        pyro.module("decoder", net)
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"mine": 1})
            return pyro.sample("x", dist.Normal(net(z), scale).to_event(1))

    return model


class ModuleModel(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.net = decoder(width)

    def forward(self, n=6):
        return function_model(self.net)(n)

    def model(self, n=6):
        return function_model(self.net)(n)


class PyroModel(PyroModule):
    def __init__(self, width=4):
        super().__init__()
        self.net = decoder(width)
        self.loc = nn.Parameter(torch.zeros(2))
        self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self, n=6):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.net(z), self.scale).to_event(1))


def make_function(width=4):
    net = decoder(width)
    return function_model(net), net


def make_module(width=4):
    module = ModuleModel(width)
    return module, module


def make_method(width=4):
    module = ModuleModel(width)
    return module.model, module


def make_partial(width=4):
    module = ModuleModel(width)
    return functools.partial(module.model, n=6), module


def make_pyro_module(width=4):
    module = PyroModel(width)
    return module, module


def make_handled(width=4):
    net = decoder(width)
    return poutine.scale(function_model(net), scale=2.0), net


PROGRAMS = [make_function, make_module, make_method, make_partial, make_pyro_module, make_handled]
each_program = pytest.mark.parametrize("make", PROGRAMS, ids=lambda make: make.__name__[5:])


def state(module):
    """Everything of a module that must not move."""
    return (
        copy.deepcopy(module.state_dict()),
        [p.grad for p in module.parameters()],
        [m.training for m in module.modules()],
        [p.requires_grad for p in module.parameters()],
    )


def assert_same_state(module, before):
    values, grads, modes, requires = before
    for name, value in module.state_dict().items():
        assert torch.equal(value, values[name]), name
    assert [p.grad for p in module.parameters()] == grads
    assert [m.training for m in module.modules()] == modes
    assert [p.requires_grad for p in module.parameters()] == requires


@each_program
def test_nothing_of_the_teacher_moves(make):
    teacher, module = make()
    module.train()
    before = state(module)
    frozen = freeze(teacher)
    pyro.clear_param_store()
    student, _ = make(3)
    svi = SVI(student, frozen, Adam({"lr": 0.1}), SurrogateKD(["x"]))
    for _ in range(3):
        svi.step()
    assert_same_state(module, before)
    copies = list(frozen._modules)
    assert copies
    assert not any(copied.training for copied in copies)
    assert not any(p.requires_grad for copied in copies for p in copied.parameters())


@each_program
def test_the_copy_holds_its_own_parameters(make):
    program, module = make()
    teacher = freeze(program)
    pyro.set_rng_seed(2)
    before = poutine.trace(teacher).get_trace()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
        for value in pyro.get_param_store()._params.values():
            value.add_(1.0)
    pyro.set_rng_seed(2)
    after = poutine.trace(teacher).get_trace()
    for name in ("z", "x"):
        assert torch.equal(before.nodes[name]["value"], after.nodes[name]["value"])
    assert not after.nodes["x"]["value"].requires_grad


@each_program
def test_the_store_is_left_alone(make):
    teacher = freeze(make()[0])
    pyro.clear_param_store()
    teacher()
    assert len(pyro.get_param_store()) == 0


@each_program
def test_svi_captures_the_students_parameters_only(make):
    teacher, _ = make(5)
    teacher()
    frozen = freeze(teacher)
    pyro.clear_param_store()
    student, module = make(3)
    with poutine.trace(param_only=True) as capture:
        SurrogateKD(["x"]).loss_and_grads(student, frozen)
    captured = {site["value"].unconstrained() for site in capture.trace.nodes.values()}
    students = set(module.parameters()) | set(pyro.get_param_store()._params.values())
    assert captured
    assert captured <= students
    assert set(module.parameters()) <= captured
    assert all(p.grad is not None for p in module.parameters())


def test_svi_does_not_capture_an_unfrozen_teachers_parameters():
    def teacher():
        pyro.sample("x", dist.Normal(pyro.param("teacher_loc", torch.tensor(3.0)), 1.0))

    def student():
        pyro.sample("x", dist.Normal(pyro.param("student_loc", torch.tensor(0.0)), 1.0))

    svi = SVI(student, teacher, Adam({"lr": 0.1}), SurrogateKD(["x"]))
    for _ in range(5):
        svi.step()
    with poutine.trace(param_only=True) as capture:
        svi.loss_and_grads(student, teacher)
    assert list(capture.trace.nodes) == ["student_loc"]
    store = pyro.get_param_store()
    assert store["teacher_loc"] == 3.0
    assert store._params["teacher_loc"].grad is None
    assert store["student_loc"] > 0.3


@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
def test_same_named_modules_of_different_shapes_train(loss):
    """Both call pyro.module("decoder", ...); the student's own tensors must receive the gradient and improve."""
    teacher, _ = make_function(8)
    teacher()
    frozen = freeze(teacher)
    pyro.clear_param_store()
    student, net = make_function(3)
    before = copy.deepcopy(net.state_dict())
    objective = loss(["x"])
    svi = SVI(student, frozen, Adam({"lr": 0.02}), objective)
    first = sum(svi.step(64) for _ in range(10))
    for _ in range(150):
        svi.step(64)
    assert sum(svi.step(64) for _ in range(10)) < 0.7 * first
    for name, value in net.named_parameters():
        assert not torch.equal(value, before[name]), name
    for name in ("0.weight", "4.weight"):
        assert pyro.get_param_store()["decoder$$$" + name] is dict(net.named_parameters())[name]


def test_infer_dicts_are_not_shared():
    mine = {"mine": 1}

    def program():
        pyro.sample("z", dist.Normal(0.0, 1.0), infer=mine)
        pyro.sample("x", dist.Normal(0.0, 1.0), infer=mine, obs=torch.tensor(0.0))

    run = next(SurrogateKD()._runs(program, freeze(program), (), {}))
    assert mine == {"mine": 1}
    for name in ("z", "x"):
        assert run.teacher.nodes[name]["infer"] is not run.student.nodes[name]["infer"]


def test_an_unfrozen_teacher_in_train_mode_is_left_as_it_was():
    """BatchNorm statistics, dropout and mode: evaluation_mode() covers teachers that were not frozen."""
    teacher = ModuleModel(5)
    student = PyroModel(3)
    teacher.train()
    before = state(teacher)

    def shape_only(n=6):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(teacher.net(z), 0.5).to_event(1))

    module = SurrogateKD(["x"])(student, shape_only)
    module().backward()
    assert_same_state(teacher, before)
    one, two = (float(SurrogateKD(["x"], latent_weight=0).loss(student.eval(), shape_only, 4000)) for _ in range(2))
    assert abs(one - two) < 0.1 * one  # dropout would show


# Ways in which a program may reach its net. Each factory returns the program and the net.


def sample_through(decode):
    with pyro.plate("rows", 6):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1))


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


def test_what_is_not_copied_is_found_out():
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


def test_a_results_of_computations_are_detached():
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


def test_parameters_loaded_from_the_store():
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


def test_bayesian_networks_freeze():
    net = PyroModule[nn.Linear](2, 1)
    net.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
    frozen = freeze(net)
    trace = poutine.trace(frozen).get_trace(torch.ones(3, 2))
    assert trace.nodes["weight"]["value"].shape == (1, 2)
    assert "bias" not in pyro.get_param_store()


def test_lazy_parameters_stay_in_the_frozen_store():
    def lazy():
        return pyro.param("made_late", lambda: torch.ones(2))

    frozen = freeze(lazy)
    assert torch.equal(frozen(), torch.ones(2))
    assert "made_late" not in pyro.get_param_store()
    assert not frozen().requires_grad


def test_freezing_twice_is_freezing_once():
    frozen = freeze(make_function()[0])
    assert freeze(frozen) is frozen


def test_to_moves_the_copy():
    frozen = freeze(ModuleModel()).to(torch.float64)
    assert next(frozen.program.parameters()).dtype == torch.float64


def test_quiet_restores_modes_after_an_error():
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    net[1].eval()
    with pytest.raises(RuntimeError, match="mine"), evaluation_mode():
        net(torch.ones(1))
        assert not net.training
        raise RuntimeError("mine")
    assert net.training
    assert not net[1].training


def test_freeze_needs_a_program():
    with pytest.raises(InvalidProgramError, match=r"the model to freeze is dict .*bound method such as vae.model"):
        freeze({"not": "callable"})


# The store after freeze: it still holds the original's entries.


def linear_program(net, name="net"):
    def model(x):
        pyro.module(name, net)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 1.0))

    return model


@pytest.mark.parametrize("sizes", [((2, 1), (2, 1)), ((2, 8, 1), (2, 3, 1))], ids=["same shape", "other shape"])
def test_a_new_student_of_the_teachers_names(sizes):
    """The usual order: train the teacher with SVI, freeze it, make the student. Pyro hands the student the teacher's tensors."""

    def make(widths):
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        return nn.Sequential(*layers)

    x = torch.randn(32, 2)
    teacher = linear_program(make(sizes[0]))
    teacher(x)
    frozen = freeze(teacher)
    net = make(sizes[1])
    svi = SVI(linear_program(net), frozen, Adam({"lr": 0.05}), SurrogateKD(["y"]))
    with pytest.raises(
        SharedParameterError, match=r"'net.0.weight', so that SVI would not train.*pyro.clear_param_store\(\)"
    ):
        svi.step(x)
    assert all(p.grad is None for p in net.parameters())
    pyro.clear_param_store()
    svi = SVI(linear_program(net), frozen, Adam({"lr": 0.05}), SurrogateKD(["y"]))
    first = svi.step(x)
    for _ in range(200):
        svi.step(x)
    assert svi.step(x) < 0.05 * first


def test_a_module_that_svi_does_not_see():
    net = nn.Linear(2, 1)

    def student(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 1.0))

    frozen = freeze(linear_program(nn.Linear(2, 1)))
    with pytest.raises(NoParametersError, match="SVI does not see.*pyro.module"):
        SVI(student, frozen, Adam({"lr": 0.05}), SurrogateKD(["y"])).step(torch.randn(5, 2))
    SurrogateKD(["y"])(student, frozen)(torch.randn(5, 2)).backward()
    assert net.weight.grad is not None


def test_continual_learning_from_a_copy():
    net = nn.Linear(2, 1)
    student, x = linear_program(net), torch.randn(16, 2)
    student(x)
    svi = SVI(student, freeze(student), Adam({"lr": 0.05}), SurrogateKD(["y"]))
    assert svi.step(x) == 0.0
    with torch.no_grad():
        net.weight.add_(1.0)
    assert svi.step(x) > 0.0


class Trainer:
    def __init__(self):
        self.net, self.teacher = nn.Linear(2, 1), None

    def model(self, x):
        return linear_program(self.net)(x)


def test_freezing_again_and_again_does_not_grow():
    """An object that holds its last teacher, as a continual trainer does."""
    trainer, sizes = Trainer(), []
    for _ in range(6):
        trainer.teacher = freeze(trainer.model)
        sizes.append(len(trainer.teacher._tensors))
    assert len(set(sizes)) == 1


def test_deepcopy_and_pickle():
    frozen = freeze(ModuleModel().model)
    pyro.set_rng_seed(0)
    value = frozen()
    twin = copy.deepcopy(frozen).to(torch.float64)
    assert twin._tensors[0].dtype == torch.float64
    pyro.set_rng_seed(0)
    assert torch.equal(frozen(), value)
    with pytest.raises(InvalidProgramError, match="cannot be pickled.*state_dict"):
        pickle.dumps(frozen)
    loss = SurrogateKD(["x"])
    loss.loss_and_grads(ModuleModel(3).model, frozen)
    assert pickle.loads(pickle.dumps(loss)).targets == ["x"]


def test_a_lazy_module_without_values():
    net = nn.LazyLinear(1)
    with pytest.raises(InvalidProgramError, match="Run the model once before"):
        freeze(lambda: sample_through(net))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda frozen: frozen,
        lambda frozen: poutine.scale(frozen, scale=1.0),
        lambda frozen: functools.partial(frozen, n=6),
        lambda frozen: ModuleModel().model,
    ],
    ids=["frozen", "handler", "partial", "method"],
)
def test_a_distillation_module_moves_its_teacher(wrap):
    module = SurrogateKD(["x"], latent_weight=0.0)(ModuleModel(3), wrap(freeze(ModuleModel())))
    module.to(torch.float64)
    for teacher in owners(module.teacher):
        if isinstance(teacher, nn.Module):
            assert next(teacher.parameters()).dtype == torch.float64
        elif hasattr(teacher, "_tensors"):
            assert teacher._tensors[0].dtype == torch.float64
    assert any(isinstance(t, nn.Module) or hasattr(t, "_tensors") for t in owners(module.teacher))
