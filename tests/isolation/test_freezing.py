"""freeze and evaluation_mode: the teacher has its own parameters, and a run changes nothing of it."""

import copy
import functools
import pickle

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

from pyro_kd import LocalKD, freeze
from pyro_kd.errors import InvalidProgramError
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.isolation.programs import owners
from tests.support.frozen_programs import assert_same_state, sample_through, state
from tests.support.losses import SurrogateKD
from tests.support.runs import runs_of

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


@each_program
def test_training_does_not_change_a_frozen_teacher(make):
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
def test_a_frozen_program_leaves_the_global_store_alone(make):
    teacher = freeze(make()[0])
    pyro.clear_param_store()
    teacher()
    assert len(pyro.get_param_store()) == 0


@each_program
def test_svi_captures_only_the_students_parameters(make):
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

    run = runs_of(SurrogateKD(), program, freeze(program))[0]
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


def test_to_casts_the_frozen_copy():
    frozen = freeze(ModuleModel()).to(torch.float64)
    assert next(frozen.program.parameters()).dtype == torch.float64


def test_evaluation_mode_restores_modes_after_an_error():
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    net[1].eval()
    with pytest.raises(RuntimeError, match="mine"), evaluation_mode():
        net(torch.ones(1))
        assert not net.training
        raise RuntimeError("mine")
    assert net.training
    assert not net[1].training


def test_freeze_refuses_what_is_not_a_program():
    with pytest.raises(InvalidProgramError, match=r"the model to freeze is dict .*bound method such as vae.model"):
        freeze({"not": "callable"})


def test_a_frozen_program_can_be_copied_but_not_pickled():
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


def test_a_lazy_module_without_values_is_refused():
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


@pytest.mark.parametrize("parametrise", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_modules_need_no_gradients(parametrise):
    net = getattr(nn.utils.parametrizations, parametrise)(nn.Linear(3, 3))

    def program(x):
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(net(x), 1.0).to_event(1))

    frozen = freeze(program)
    pyro.set_rng_seed(0)
    first = frozen(torch.ones(2, 3))
    assert not any(param.requires_grad for module in frozen.modules_held for param in module.parameters())
    assert all(param.requires_grad for param in net.parameters())
    with torch.no_grad():
        for param in net.parameters():
            param.add_(1.0)
    pyro.set_rng_seed(0)
    assert torch.equal(frozen(torch.ones(2, 3)), first)
