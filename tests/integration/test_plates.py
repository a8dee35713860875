"""Constructs of Pyro around a site: plates, markov, mask, scale, obs_mask, factors, control flow, enumeration, subsampled data.

Most programs here are Gaussian with a location `loc` that enters every mean linearly: the teacher has 0 and the student 1. Then
every term is a constant times `loc` squared, which can be worked out by hand, and the gradient at 1 is twice the loss.
"""

import math
import re
from collections import defaultdict

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, config_enumerate
from pyro.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from pyro_kd import LocalKD, SurrogateKD, freeze
from pyro_kd.divergences import kl
from pyro_kd.errors import PlateMismatchError, UnpairedSiteError

both = pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
particles = pytest.mark.parametrize(
    "options",
    [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}],
    ids=["one", "loop", "vectorized"],
)


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


def only_run(loss, student, teacher, *args):
    (run,) = [particle.run for particle in loss.particles(student, teacher, *args)]
    return run


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


# Subsampling: which rows.


def rows_of(options, label, seen):
    data = torch.arange(100.0)

    def model():
        with pyro.plate("rows", 100, **options) as index:
            seen[label].append(index)
            z = pyro.sample("z", dist.Normal(data[index], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    return model


@both
@particles
def test_both_programs_see_the_rows_of_an_explicit_subsample(loss, options):
    """In the user's order; and no noise is recorded for them, so that none can be supplied."""
    mine, seen = torch.tensor([40, 7, 93]), defaultdict(list)
    programs = [rows_of({"subsample": mine}, label, seen) for label in ("student", "teacher")]
    objective = loss(["x"], **options)
    for run in objective._runs(*programs, (), {}):
        assert "rows" not in run.noise
        (z, x) = run.pairs
        assert torch.equal(z.p.mean.reshape(-1, 3)[0], mine.float())
        assert torch.equal(z.q.mean.reshape(-1, 3)[-1], mine.float())
        assert x.scale == pytest.approx(100 / 3)
    assert all(torch.equal(index, mine) for label in seen for index in seen[label])


@both
@particles
def test_both_programs_see_the_same_random_rows(loss, options):
    seen = defaultdict(list)
    programs = [rows_of({"subsample_size": 5}, label, seen) for label in ("student", "teacher")]
    for _ in range(3):
        for run in loss(["x"], max_plate_nesting=1, **options)._runs(*programs, (), {}):
            index = run.teacher.nodes["rows"]["value"]
            assert torch.equal(run.student.nodes["rows"]["value"], index)
            assert torch.equal(run.pairs[0].q.mean.reshape(-1, 5)[0], index.float())
    assert len({tuple(index.tolist()) for index in seen["student"]}) > 1
    assert {tuple(index.tolist()) for index in seen["student"]} == {tuple(index.tolist()) for index in seen["teacher"]}


@pytest.mark.parametrize("teachers", [{"subsample": torch.tensor([1, 2])}, {"subsample_size": 2}], ids=["other", "random"])
def test_rows_that_differ_are_an_error(teachers):
    seen = defaultdict(list)
    student = rows_of({"subsample": torch.tensor([98, 99])}, "student", seen)
    with pytest.raises(PlateMismatchError, match="rows"):
        SurrogateKD(["x"]).loss(student, rows_of(teachers, "teacher", seen))


def test_a_random_subsample_of_the_student_alone_is_an_error():
    seen = defaultdict(list)
    programs = [rows_of(k, "any", seen) for k in ({"subsample_size": 2}, {"subsample": torch.tensor([1, 2])})]
    with pytest.raises(UnpairedSiteError, match="'rows'"):
        SurrogateKD(["x"]).loss(*programs)


@both
def test_pyro_subsample_takes_the_same_rows_of_the_data(loss):
    data = torch.randn(50, 2)

    def program(weight):
        def model(data):
            with pyro.plate("rows", len(data), subsample_size=8) as index:
                batch = pyro.subsample(data, event_dim=1)
                assert torch.equal(batch, data[index])
                pyro.sample("x", dist.Normal(batch @ weight, 1.0))

        return model

    weight = torch.tensor([1.0, -2.0], requires_grad=True)
    pyro.set_rng_seed(3)
    value = loss(["x"]).differentiable_loss(program(weight), program(torch.zeros(2)), data)
    pyro.set_rng_seed(3)
    run = only_run(loss(["x"]), program(weight), program(torch.zeros(2)), data)
    batch = data[run.student.nodes["rows"]["value"]]
    assert float(value.detach()) == pytest.approx(50 / 8 * float((batch @ weight.detach()).square().sum() / 2), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, weight)
    assert torch.allclose(gradient, 50 / 8 * batch.T @ (batch @ weight.detach()), rtol=1e-4)


@both
def test_a_parameter_subsampled_by_a_plate_learns_at_the_drawn_rows(loss):
    def student():
        with pyro.plate("rows", 20, subsample_size=5):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.arange(20.0), event_dim=0), 1.0))

    def teacher():
        with pyro.plate("rows", 20, subsample_size=5):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    pyro.set_rng_seed(2)
    run = only_run(loss(["x"]), student, teacher)
    drawn = run.teacher.nodes["rows"]["value"]
    pyro.set_rng_seed(2)
    assert loss(["x"]).loss_and_grads(student, teacher) == pytest.approx(4 * float(drawn.float().square().sum()) / 2)
    expected = torch.zeros(20).index_put((drawn,), 4 * drawn.float())
    assert torch.equal(pyro.param("loc").unconstrained().grad, expected)


@both
def test_minibatches_of_a_data_loader_average_to_the_whole(loss):
    """With the rows of a batch as explicit subsample the scale is that of the plate, and the mean over an epoch is exact."""
    data = torch.randn(12, 2)
    loader = DataLoader(TensorDataset(torch.arange(12), data), batch_size=4, shuffle=True)

    def program(weight):
        def model(index, batch):
            with pyro.plate("rows", 12, subsample=index):
                z = pyro.sample("z", dist.Normal(batch @ weight, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0))

        return model

    student, teacher = program(torch.tensor([1.0, 0.5])), program(torch.tensor([-1.0, 0.0]))
    objective = loss(["x"], latent_weight=0.2)
    whole = objective.loss(student, teacher, torch.arange(12), data)
    batches = [objective.loss(student, teacher, index, batch) for index, batch in loader]
    assert len(batches) == 3
    assert sum(batches) / 3 == pytest.approx(whole, rel=1e-5)
    difference = data @ torch.tensor([2.0, 0.5])
    each = {SurrogateKD: 0.2 + 1, LocalKD: 0.2}[loss]
    assert whole == pytest.approx(each * float(difference.square().sum() / 2), rel=1e-5)


def test_dims_that_differ_are_an_error():
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


# Control flow that depends on drawn values.


def geometric(probs):
    def model():
        count = 0
        while pyro.sample(f"stop_{count}", dist.Bernoulli(probs)) == 0:
            count += 1
        pyro.sample("x", dist.Normal(float(count), 1.0))
        return count

    return model


SOONER, LATER = geometric(torch.tensor(0.5)), geometric(torch.tensor(0.1))
STOP_KL = float(kl(dist.Bernoulli(torch.tensor(0.1)), dist.Bernoulli(torch.tensor(0.5)), torch.tensor(0.0)))


@pytest.mark.parametrize(
    "objective",
    [LocalKD(["x"]), SurrogateKD(lambda site: site["type"] == "sample"), LocalKD(lambda site: site["type"] == "sample")],
    ids=["local", "surrogate with the stops as targets", "local with the stops as targets"],
)
def test_a_loop_that_stops_on_a_given_value_takes_the_teachers_path(objective):
    lengths = set()
    for seed in range(8):
        pyro.set_rng_seed(seed)
        terms = objective.terms(SOONER, LATER)
        values = [float(term.value) for name, term in terms.items() if name != "x"]
        assert values == pytest.approx(len(values) * [STOP_KL])
        assert terms["x"].value == 0
        lengths.add(len(values))
    assert len(lengths) > 3


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (SOONER, LATER, r"site 'stop_\d+' is in the teacher only"),
        (LATER, SOONER, r"'stop_\d+' (?:is|are) in the student only"),
    ],
    ids=["student stops first", "teacher stops first"],
)
def test_a_loop_whose_length_depends_on_a_latent_is_an_error_where_the_paths_part(student, teacher, message):
    """With shared noise the paths are equal or part; the error names the first site that one program has alone."""
    parted = equal = 0
    for seed in range(20):
        pyro.set_rng_seed(seed)
        try:
            terms = SurrogateKD(["x"]).terms(student, teacher)
        except UnpairedSiteError as error:
            parted += len(re.findall(message, str(error)))
        else:
            assert terms["x"].value == 0
            equal += 1
    assert parted > 0
    assert equal > 0


def test_a_branch_on_a_latent_shares_the_noise_of_the_branch_taken():
    """Both programs take the branch that the shared uniform chooses, if they agree on its probability."""

    def program(loc):
        def model():
            if pyro.sample("which", dist.Bernoulli(0.5)) > 0:
                return pyro.sample("x", dist.Normal(pyro.sample("left", dist.Normal(loc, 1.0)), 1.0))
            return pyro.sample("x", dist.Normal(2 * pyro.sample("right", dist.Normal(loc, 1.0)), 1.0))

        return model

    branches = set()
    for _ in range(20):
        terms = SurrogateKD(["x"]).terms(program(1.0), program(0.0))
        _, branch, x = terms
        assert float(terms[x].value) == pytest.approx({"left": 0.5, "right": 2.0}[branch])
        branches.add(branch)
    assert branches == {"left", "right"}


# Enumeration: the annotations are for other inference algorithms; here such sites are drawn like others.

ENUMERATED = {
    "parallel": lambda fn: poutine.infer_config(fn, config_fn=lambda site: {"enumerate": "parallel"}),
    "sequential": lambda fn: poutine.infer_config(fn, config_fn=lambda site: {"enumerate": "sequential"}),
    "config_enumerate": config_enumerate,
    "config_enumerate sequential, expanded": lambda fn: config_enumerate(fn, default="sequential", expand=True),
    "none": lambda fn: fn,
}


@pytest.mark.parametrize("how", ENUMERATED)
@both
@particles
def test_sites_to_be_enumerated_are_drawn(loss, options, how):
    def program(logits):
        def model():
            with pyro.plate("rows", 5):
                k = pyro.sample("k", dist.Categorical(logits=logits), infer={"mine": 1})
                pyro.sample("x", dist.Normal(k.float(), 1.0))

        return ENUMERATED[how](model)

    student = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
    teacher = torch.tensor([0.5, 0.5, 0.0])
    objective = loss(["x"], latent_weight=2.0, max_plate_nesting=1, **options)
    value = objective.differentiable_loss(program(student), program(teacher))
    pyro.set_rng_seed(0)
    terms = objective.terms(program(student), program(teacher))
    pyro.set_rng_seed(0)
    runs = list(objective._runs(program(student), program(teacher), (), {}))
    expected = 5 * float(kl(dist.Categorical(logits=teacher), dist.Categorical(logits=student), torch.tensor(0)).detach())
    assert float(terms["k"].value.detach()) == pytest.approx(expected, rel=1e-5)
    squares = [(run.student.nodes["k"]["value"] - run.teacher.nodes["k"]["value"]).square().sum() / 2 for run in runs]
    by_hand = float(sum(squares)) / objective.num_particles
    assert float(terms["x"].value.detach()) == pytest.approx(by_hand)
    (gradient,) = torch.autograd.grad(value, student)
    assert torch.allclose(gradient, 2.0 * 5 * (student.softmax(-1) - teacher.softmax(-1)).detach(), atol=1e-5)
    assert all(run.student.nodes["k"]["infer"]["mine"] == 1 for run in runs)


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
