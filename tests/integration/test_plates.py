"""Constructs of Pyro around a site: plates, markov, mask, scale, obs_mask, factors, control flow, enumeration, subsampled data.

Most programs here are Gaussian with a location `loc` that enters every mean linearly: the teacher has 0 and the student 1. Then
every term is a constant times `loc` squared, which can be worked out by hand, and the gradient at 1 is twice the loss.
"""

import math
from collections import defaultdict

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam

from pyro_kd import LocalKD, SurrogateKD, freeze
from pyro_kd.errors import PlateMismatchError
from tests.support.plates import both, particles
from tests.support.runs import only_run


def draw(name, mean):
    return pyro.sample(name, dist.Normal(mean, 1.0))


def pair(loc, suffix=""):
    """z ~ N(loc, 1), x ~ N(z + loc, 1): 1/2 at z, 4/2 at x of the surrogate loss, 1/2 at x of the local loss."""
    return draw("x" + suffix, draw("z" + suffix, loc) + loc)


def is_x(site):
    return site["name"].startswith("x")


def totals(terms):
    """The terms by the part of the name before an underscore: z_0, z_1, ... count as z."""
    sums = defaultdict(float)
    for term in terms.values():
        sums[term.name.split("_")[0]] += float(term.value.detach())
    return dict(sums)


# Each takes loc and draws z (latent) and x (target) sites.


def nested_plates(loc):
    with pyro.plate("outer", 3, dim=-2):
        z = draw("z", loc)
        with pyro.plate("inner", 4, dim=-1):
            draw("x", z + loc)


def nested_plates_without_dim(loc):
    with pyro.plate("outer", 3):
        z = draw("z", loc)
        with pyro.plate("inner", 4):
            draw("x", z + loc)


def crossed_plates(loc):
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
    with rows:
        z = draw("z_row", loc)
    with columns:
        w = draw("z_column", loc)
    with rows, columns:
        draw("x", z + w + loc)


def plate_entered_twice(loc):
    rows = pyro.plate("rows", 3)
    with rows:
        z = draw("z", loc)
    with rows:
        draw("x", z + loc)


def plate_stack(loc):
    with pyro.plate_stack("stack", (2, 3)):
        pair(loc)


def plate_of_dim_minus_two(loc):
    with pyro.plate("rows", 3, dim=-2):
        pair(loc)


def sequential_plate(loc):
    for i in pyro.plate("rows", 3):
        pair(loc, f"_{i}")


def sequential_in_vectorized(loc):
    with pyro.plate("rows", 3):
        for i in pyro.plate("steps", 2):
            pair(loc, f"_{i}")


def subsampled_plate(loc):
    with pyro.plate("rows", 10, subsample_size=2):
        pair(loc)


def full_subsample(loc):
    with pyro.plate("rows", 4, subsample_size=4):
        pair(loc)


def nested_subsampled_plates(loc):
    with pyro.plate("outer", 10, subsample_size=2, dim=-2):
        z = draw("z", loc)
        with pyro.plate("inner", 6, subsample_size=3, dim=-1):
            draw("x", z + loc)


def sequential_subsampled_plate(loc):
    for i in pyro.plate("rows", 10, subsample_size=3):
        pair(loc, f"_{i}")


def explicit_subsample(loc):
    with pyro.plate("rows", 10, subsample=torch.tensor([7, 3])):
        pair(loc)


def explicit_subsample_as_a_list(loc):
    for i in pyro.plate("rows", 10, subsample=[7, 3]):
        pair(loc, f"_{i}")


def steps(loc, times):
    z = 0.0
    for t in times:
        z = draw(f"z_{t}", z + loc)
    draw("x", z + loc)


def markov_loop(loc):
    steps(loc, pyro.markov(range(3)))


def markov_loop_in_a_plate(loc):
    with pyro.plate("rows", 4):
        steps(loc, pyro.markov(range(3)))


def markov_with_history(loc):
    steps(loc, pyro.markov(range(3), history=2, keep=True))


def markov_recursion(loc):
    @pyro.markov
    def recur(z, t):
        if t == 3:
            return draw("x", z + loc)
        return recur(draw(f"z_{t}", z + loc), t + 1)

    recur(0.0, 0)


def markov_context(loc):
    with pyro.plate("rows", 4), poutine.markov(history=1):
        steps(loc, range(3))


def mask_of_rows(loc):
    with pyro.plate("rows", 4), poutine.mask(mask=torch.tensor([True, False, True, True])):
        pair(loc)


def mask_of_one_site(loc):
    with pyro.plate("rows", 4):
        z = draw("z", loc)
        with poutine.mask(mask=torch.tensor([True, False, False, True])):
            draw("x", z + loc)


def masks_that_meet(loc):
    columns, rows = torch.tensor([True, True, False]), torch.tensor([[True], [False]])
    with pyro.plate("outer", 2, dim=-2), poutine.mask(mask=rows), pyro.plate("inner", 3, dim=-1), poutine.mask(mask=columns):
        pair(loc)


def mask_of_everything(loc):
    with pyro.plate("rows", 4):
        z = draw("z", loc)
        with poutine.mask(mask=False):
            draw("z_ignored", 3 * loc)
        draw("x", z + loc)


def mask_of_the_distribution(loc):
    keep = torch.tensor([True, False, True, True])
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.Normal(loc, 1.0).mask(keep))
        with poutine.mask(mask=torch.tensor([True, True, False, True])):
            pyro.sample("x", dist.Normal(z + loc, 1.0).mask(keep))


def scales_that_meet(loc):
    with poutine.scale(scale=2.0), pyro.plate("rows", 4):
        z = draw("z", loc)
        with poutine.scale(scale=1.5):
            draw("x", z + loc)


def scale_of_rows(loc):
    with pyro.plate("rows", 3), poutine.scale(scale=torch.tensor([1.0, 2.0, 4.0])):
        pair(loc)


def scale_mask_and_subsample(loc):
    keep = torch.tensor([True, False, True, False])
    with pyro.plate("rows", 10, subsample_size=4), poutine.scale(scale=3.0), poutine.mask(mask=keep):
        pair(loc)


def factor_and_deterministic(loc):
    with pyro.plate("rows", 3):
        z = draw("z", loc)
        pyro.factor("penalty", -5 * z)
        shifted = pyro.deterministic("shifted", z + loc)
        draw("x", shifted)


def observed_beside_drawn(loc):
    with pyro.plate("rows", 3):
        data = pyro.sample("data", dist.Normal(loc, 1.0), obs=torch.tensor([1.0, 2.0, 3.0]))
        z = draw("z", loc * data)
        draw("x", z + loc * data)


def loop_and_if(loc):
    z = 0.0
    for i in range(4):
        if i % 2 == 0:
            z = draw(f"z_{i}", z + loc)
    draw("x", z + loc)


def helper_functions(loc):
    def first():
        return draw("z", loc)

    def second():
        return draw("x", first() + loc)

    with pyro.plate("rows", 3):
        second()


def barrier_between(loc):
    with pyro.plate("rows", 3):
        z = draw("z", loc)
        z = pyro.barrier(z)
        draw("x", z + loc)


# program -> (z, x of the surrogate loss, x of the local loss)
PROGRAMS = {
    nested_plates: (3 / 2, 12 * 4 / 2, 12 / 2),
    nested_plates_without_dim: (3 / 2, 12 * 4 / 2, 12 / 2),
    crossed_plates: (7 / 2, 12 * 9 / 2, 12 / 2),
    plate_entered_twice: (3 / 2, 3 * 4 / 2, 3 / 2),
    plate_stack: (6 / 2, 6 * 4 / 2, 6 / 2),
    plate_of_dim_minus_two: (3 / 2, 3 * 4 / 2, 3 / 2),
    sequential_plate: (3 / 2, 3 * 4 / 2, 3 / 2),
    sequential_in_vectorized: (6 / 2, 6 * 4 / 2, 6 / 2),
    subsampled_plate: (10 / 2, 10 * 4 / 2, 10 / 2),
    full_subsample: (4 / 2, 4 * 4 / 2, 4 / 2),
    nested_subsampled_plates: (10 / 2, 60 * 4 / 2, 60 / 2),
    sequential_subsampled_plate: (10 / 2, 10 * 4 / 2, 10 / 2),
    explicit_subsample: (10 / 2, 10 * 4 / 2, 10 / 2),
    explicit_subsample_as_a_list: (10 / 2, 10 * 4 / 2, 10 / 2),
    markov_loop: ((1, 14), 16 / 2, 1 / 2),
    markov_loop_in_a_plate: ((4, 14), 4 * 16 / 2, 4 / 2),
    markov_with_history: ((1, 14), 16 / 2, 1 / 2),
    markov_recursion: ((1, 14), 16 / 2, 1 / 2),
    markov_context: ((4, 14), 4 * 16 / 2, 4 / 2),
    mask_of_rows: (3 / 2, 3 * 4 / 2, 3 / 2),
    mask_of_one_site: (4 / 2, 2 * 4 / 2, 2 / 2),
    masks_that_meet: (2 / 2, 2 * 4 / 2, 2 / 2),
    mask_of_everything: (4 / 2, 4 * 4 / 2, 4 / 2),
    mask_of_the_distribution: (3 / 2, 2 * 4 / 2, 2 / 2),
    scales_that_meet: (2 * 4 / 2, 3 * 4 * 4 / 2, 3 * 4 / 2),
    scale_of_rows: (7 / 2, 7 * 4 / 2, 7 / 2),
    scale_mask_and_subsample: (3 * 10 / 4 * 2 / 2, 3 * 10 / 4 * 2 * 4 / 2, 3 * 10 / 4 * 2 / 2),
    factor_and_deterministic: (3 / 2, 3 * 4 / 2, 3 / 2),
    observed_beside_drawn: (14 / 2, 14 * 4 / 2, 14 / 2),
    loop_and_if: ((1, 5, 2), 9 / 2, 1 / 2),
    helper_functions: (3 / 2, 3 * 4 / 2, 3 / 2),
    barrier_between: (3 / 2, 3 * 4 / 2, 3 / 2),
}


def expected_totals(program, loss):
    z, x_surrogate, x_local = PROGRAMS[program]
    if isinstance(
        z, tuple
    ):  # a chain: (rows, squares of 1, 2, ... summed, number of steps): the local loss sees each step alone
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
