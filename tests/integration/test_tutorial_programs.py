"""Every program of tests/programs is distilled unchanged: the loss falls, the whole student learns, the teacher stays."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam

from pyro_kd import LocalKD
from tests.support.losses import SurrogateKD
from tests.support.tutorial_programs import MODULES, NAMES, modules_in, parameters_of_student, run

NOISES = 10


pytestmark = [
    # of Pyro's sparse Gaussian processes
    pytest.mark.filterwarnings("ignore:pyro.factor 'trace_term' has no part in the loss"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(params=MODULES, ids=NAMES)
def program(request):
    return request.param.program()


def on_fixed_noise(loss, program):
    """The loss at seeds of their own, the same in every call."""
    values = []
    for seed in range(NOISES):
        pyro.set_rng_seed(1000 + seed)
        values.append(loss.loss(program.student, program.teacher, *program.args))
    return torch.tensor(values, dtype=torch.float64)


def sites(trace, kind):
    return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == kind and site["value"] is not None}


def unconstrained(value):
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def parameters_of_teacher(program):
    """Unconstrained: those of its ``pyro.param`` statements, and those of its modules."""
    statements = sites(run(program.teacher, program.args), "param").values()
    owner = getattr(program.teacher.program, "__self__", program.teacher.program)
    in_modules = [value for module in modules_in(owner) for value in module.parameters()]
    return [unconstrained(value) for value in [*statements, *in_modules]]


@pytest.mark.filterwarnings("ignore:the student draws these outside")
def test_surrogate_distillation_lowers_the_loss_and_leaves_the_teacher_alone(program):
    loss = SurrogateKD(**program.options)
    params = parameters_of_student(program)
    start = {name: value.detach().clone() for name, value in params.items()}
    before = on_fixed_noise(loss, program)
    taught = [value.clone() for value in parameters_of_teacher(program)]
    drawn = sites(run(program.teacher, program.args), "sample")

    svi = SVI(program.student, program.teacher, Adam({"lr": program.lr}), loss=loss)
    losses = [svi.step(*program.args) for _ in range(program.steps)]
    after = on_fixed_noise(loss, program)

    assert all(math.isfinite(value) for value in losses)
    # A sign test and medians, since some of these losses have heavy tails: 9 of 10 by chance has probability 0.01.
    assert (after < before).sum() >= NOISES - 1
    assert after.median() < 0.8 * before.median()

    assert params
    assert pyro.get_param_store().keys() <= params.keys()
    assert [name for name, value in params.items() if torch.equal(value, start[name])] == []

    now = parameters_of_teacher(program)
    assert taught
    assert len(now) == len(taught)
    assert all(torch.equal(value, old) for value, old in zip(now, taught, strict=True))
    assert not any(value.requires_grad or value.grad is not None for value in now)
    assert all(
        torch.equal(value, drawn[name]) for name, value in sites(run(program.teacher, program.args), "sample").items()
    )


@pytest.mark.filterwarnings("ignore:the student draws these outside")
def test_local_distillation_gives_every_parameter_of_the_student_a_gradient(program):
    loss = LocalKD(**program.options)
    before = on_fixed_noise(loss, program)
    loss.loss_and_grads(program.student, program.teacher, *program.args)
    assert torch.isfinite(before).all()
    assert before.median() > 0
    grads = [value.grad for value in parameters_of_student(program).values()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_a_teacher_has_nothing_to_learn_from_itself(program):
    """Replayed on its own noise, a program repeats itself, and every term is 0 but for rounding."""
    targets = program.options.get("targets")
    for loss in (SurrogateKD(targets), LocalKD(targets)):
        terms = loss.terms(program.teacher, program.teacher, *program.args)
        assert terms
        assert [name for name, term in terms.items() if abs(float(term.value)) > 1e-4] == []
