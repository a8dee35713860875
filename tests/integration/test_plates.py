"""Constructs of Pyro around a site have the terms worked out by hand: plates, markov, mask, scale, obs_mask, factors, control flow."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam

from pyro_kd import LocalKD, freeze
from pyro_kd.errors import PlateMismatchError
from tests.support.loss_options import both, particles
from tests.support.losses import SurrogateKD
from tests.support.plate_programs import PROGRAMS, is_x, totals
from tests.support.runs import only_run


def expected_totals(program, loss):
    z, x_surrogate, x_local = PROGRAMS[program]
    # A chain gives (rows, squares of 1, 2, ... summed, number of steps). The local loss sees each step alone.
    if isinstance(z, tuple):
        rows, squares, length = (*z, 3)[:3]
        z = {SurrogateKD: rows * squares / 2, LocalKD: rows * length / 2}[loss]
    return {"z": z, "x": {SurrogateKD: x_surrogate, LocalKD: x_local}[loss]}


each_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)


@each_program
@pytest.mark.filterwarnings("ignore:pyro.factor .* has no part in the loss")
@both
@particles
def test_terms_and_gradient_are_those_by_hand(program, loss, options):
    loc = torch.tensor(1.0, requires_grad=True)
    objective = loss(is_x, latent_weight=0.3, **options)

    def student():
        program(loc)

    def teacher():
        program(torch.tensor(0.0))

    terms = objective.terms(student, teacher)
    expected = expected_totals(program, loss)
    assert totals(terms) == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}
    value = objective.differentiable_loss(student, freeze(teacher))
    assert float(value.detach()) == pytest.approx(0.3 * expected["z"] + expected["x"], rel=1e-5)
    (gradient,) = torch.autograd.grad(value, loc)
    assert float(gradient) == pytest.approx(2 * (0.3 * expected["z"] + expected["x"]), rel=1e-5)


# Plates that differ.


def test_plates_with_different_dims_are_an_error():
    def program(dim):
        def model():
            with pyro.plate("rows", 3, dim=dim):
                pyro.sample("x", dist.Normal(0.0, 1.0))

        return model

    with pytest.raises(PlateMismatchError, match=r"'x' has batch shape \(3,\) in the teacher and \(3, 1\) in the student"):
        SurrogateKD(["x"]).loss(program(-2), program(-1))


# obs_mask.


def partly_observed(loc):
    def model():
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            data, mask = torch.full((3,), 1e6), torch.tensor([True, False, True])
            x = pyro.sample("x", dist.Normal(z, 1.0), obs=data, obs_mask=mask)
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(3))

    return model


@both
@particles
def test_obs_mask_observed_rows_are_targets_and_the_others_latents(loss, options):
    """Pyro makes the sites x_observed and x_unobserved, under mask and its complement, and a deterministic x of both."""
    terms = loss(**options).terms(partly_observed(1.0), partly_observed(torch.tensor(0.0)))
    kinds = {name: term.kind for name, term in terms.items()}
    assert kinds == {"z": "latent", "x_observed": "target", "x_unobserved": "latent", "y": "target"}
    expected = {
        SurrogateKD: {"z": 1.5, "x_observed": 1.0, "x_unobserved": 0.5, "y": 0.5},  # y: the one row that was not given
        LocalKD: {"z": 1.5, "x_observed": 0.0, "x_unobserved": 0.0, "y": 0.0},
    }[loss]
    assert {name: float(term.value) for name, term in terms.items()} == pytest.approx(expected)


@particles
def test_obs_mask_both_parts_as_targets_make_the_whole_site(options):
    objective = SurrogateKD(["x_observed", "x_unobserved", "y"], **options)
    terms = objective.terms(partly_observed(1.0), partly_observed(torch.tensor(0.0)))
    values = {name: float(term.value) for name, term in terms.items() if term.kind == "target"}
    assert values == pytest.approx({"x_observed": 1.0, "x_unobserved": 0.5, "y": 0.0})


@pytest.mark.parametrize("names", [None, ["y"]], ids=["observed", "named"])
def test_obs_mask_data_are_drawn_again_or_kept(names):
    """Where x_observed is a target its data are the teacher's draws; where it is none, they are inputs of both programs."""
    run = only_run(SurrogateKD(names), partly_observed(1.0), partly_observed(torch.tensor(0.0)))
    for trace in (run.student, run.teacher):
        assert (trace.nodes["x"]["value"][0] == 1e6) == (names is not None)
    student, teacher = run.student.nodes["x"]["value"], run.teacher.nodes["x"]["value"]
    assert torch.allclose(student - teacher, torch.tensor([0.0, 1.0, 0.0]))


# A whole training run with several constructs at once.


@both
def test_training_through_plates_masks_and_markov_finds_the_teacher(loss):
    keep = torch.arange(12) % 3 > 0

    def program(drift):
        def model(rows):
            with pyro.plate("rows", rows, subsample_size=4) as index, poutine.mask(mask=keep[index]):
                z = torch.zeros(4)
                for t in pyro.markov(range(3)):
                    z = pyro.sample(f"z_{t}", dist.Normal(z + drift(), 1.0))
                pyro.sample("x", dist.Normal(z, 0.5))

        return model

    student = program(lambda: pyro.param("drift", torch.tensor(0.0)))
    svi = SVI(student, program(lambda: 0.7), Adam({"lr": 0.05}), loss(["x"]))
    for _ in range(250):
        svi.step(12)
    assert math.isclose(pyro.param("drift").item(), 0.7, abs_tol=0.02)
