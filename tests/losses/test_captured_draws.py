"""The draws of a teacher by a graph: what eager draws are, bit for bit, in every loss and for every kind of teacher."""

import random
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import DrawsKD, LocalKD, MultiSampleKD, SurrogateKD, freeze
from tests.support.captured import MARKS
from tests.support.counted_rows import teacher

pytestmark = MARKS


def student(rows, shift=0.0):
    a = pyro.param("a", torch.tensor(0.5))
    with pyro.plate("rows", rows):
        z = pyro.sample("z", dist.Normal(0.1, 1.0))
        n = pyro.sample("n", dist.Poisson((a * z).exp()))
        pyro.sample("x", dist.Normal(a * z + 0.1 * n + shift, 0.5))


def steps(loss, teacher, *calls, before=lambda step: None):
    """Loss, gradient and next random number of each step, from an empty parameter store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    found = []
    for number, call in enumerate(calls):
        before(number)
        if "a" in pyro.get_param_store():
            pyro.get_param_store()._params["a"].grad = None
        value = loss.loss_and_grads(student, teacher, *call)
        found.append((value, pyro.get_param_store()._params["a"].grad.item(), torch.rand(()).item()))
    return found


def num_graphs(loss, teacher):
    captured = loss.pair_of(student, teacher).captured_draws
    return None if captured is None else captured._capture.num_graphs


LOSSES = {
    "surrogate": lambda **options: SurrogateKD(["x"], **options),
    "teacher forcing": lambda **options: SurrogateKD(["x"], teacher_forcing=0.5, **options),
    "local": lambda **options: LocalKD(["x"], **options),
    "implicit": lambda **options: SurrogateKD(["x"], discrete_gradient={"n": "implicit"}, **options),
    "particles": lambda **options: SurrogateKD(
        ["x"], num_particles=2, vectorize_particles=True, max_plate_nesting=1, **options
    ),
    "draws": lambda **options: DrawsKD(["x"], **options),
}


@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_steps_on_captured_draws_are_the_eager_ones(make):
    program, calls = freeze(teacher), [(5,)] * 10
    eager, captured = make(reuse=2), make(reuse=2).compile(backend=None)
    assert steps(captured, program, *calls) == steps(eager, program, *calls)
    assert num_graphs(captured, program) == 1
    assert num_graphs(eager, program) is None


def test_a_loss_that_runs_its_student_with_the_teacher_draws_without_a_graph():
    program, calls = freeze(teacher), [(5,)] * 6
    eager, captured = (MultiSampleKD(["x"], num_samples=3, reuse=2) for _ in range(2))
    assert steps(captured.compile(backend=None), program, *calls) == steps(eager, program, *calls)
    assert num_graphs(captured, program) is None


def test_draws_have_the_arguments_of_their_call():
    """Tensors are inputs of the graph, and numbers have a graph of their own."""
    program = freeze(teacher)
    calls = [(rows, torch.tensor(float(shift))) for shift in range(6) for rows in (3, 4)]
    eager, captured = SurrogateKD(["x"], reuse=2), SurrogateKD(["x"], reuse=2).compile(backend=None)
    assert steps(captured, program, *calls) == steps(eager, program, *calls)
    assert num_graphs(captured, program) == 2


def test_a_schedule_makes_no_further_graph_of_the_draws():
    program = freeze(teacher)
    captured = SurrogateKD(["x"], reuse=2).compile(backend=None)

    def before(step):
        captured.latent_weight = 0.1 * (step + 1)

    steps(captured, program, *[(5,)] * 8, before=before)
    assert num_graphs(captured, program) == 1


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.0))

    def forward(self, rows):
        teacher(rows, self.shift)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_draws_have_the_weights_that_a_teacher_has_now(is_frozen):
    """Also where the graph holds them, as those of a frozen teacher."""
    found = []
    for compile in (False, True):
        module = Shift()
        program = freeze(module) if is_frozen else module
        loss = SurrogateKD(["x"], reuse=2)
        if compile:
            loss.compile(backend=None)

        def before(step, program=program):
            with torch.no_grad():
                for tensor in program.tensors() if is_frozen else program.parameters():
                    tensor += step // 4

        found.append(steps(loss, program, *[(5,)] * 12, before=before))
        if compile:
            assert num_graphs(loss, program) >= 1
    assert found[0] == found[1]


def test_a_teacher_in_pyros_store_is_unseen_by_svi():
    def stored(rows):
        teacher(rows, pyro.param("shift", torch.tensor(1.0)))

    captured = SurrogateKD(["x"], reuse=2).compile(backend=None)
    pyro.clear_param_store()
    svi = pyro.infer.SVI(student, stored, pyro.optim.Adam({"lr": 0.1}), captured)
    for _ in range(8):
        svi.step(5)
    assert num_graphs(captured, stored) == 1
    assert pyro.param("shift").item() == 1.0
    assert pyro.param("a").item() != 0.5


def trials(number, params):
    def program(rows, trials):
        a = pyro.param("a", torch.tensor(0.5)) if params else number
        with pyro.plate("rows", rows):
            n = pyro.sample("n", dist.Binomial(trials, torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(a * n, 0.5))

    return program


def both_ways(student, teacher, calls):
    """The losses of eager and of captured steps, and in how many captured draws a guard did not hold."""
    values = []
    for options in (None, {"backend": None}):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = SurrogateKD(["x"], reuse=2)
        if options:
            loss.compile(**options)
        values.append([loss.loss_and_grads(student, teacher, *call) for call in calls])
    (specialisation,) = loss.pair_of(student, teacher).captured_draws._capture._cache._specialisations.values()
    return *values, sum(entry.num_misses for entry in specialisation.entries)


def test_a_draw_that_fails_a_guard_is_made_again():
    """The largest number of trials decides how a binomial draw is made, and differs from call to call."""
    program, learner = trials(1.0, False), trials(0.0, True)
    few, many = torch.tensor([3.0, 5.0]), torch.tensor([4.0, 9.0])
    eager, captured, num_misses = both_ways(learner, program, [(2, few), (2, many), (2, few), (2, few)])
    assert num_misses == 1
    assert eager == captured


def test_a_guard_of_a_graph_without_inputs():
    """A frozen teacher's tensors are constants of the graph, and what its draws decide is a guard."""

    def program(probability):
        def model(rows):
            p = probability()
            with pyro.plate("rows", rows):
                n = pyro.sample("n", dist.Binomial(6, p))
                m = pyro.sample("m", dist.Binomial(n, p))
                pyro.sample("x", dist.Normal(m, 0.5))

        return model

    teacher = freeze(program(lambda: torch.tensor(0.4)))
    student = program(lambda: pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*branch on the values of tensors")
        eager, captured, num_misses = both_ways(student, teacher, [(2,)] * 12)
    assert eager == captured
    assert num_misses > 0


CHANGES = {
    "targets": (lambda **options: SurrogateKD(["x"], **options), "targets", ["n", "x"]),
    "vectorized particles": (
        lambda **options: SurrogateKD(["x"], num_particles=2, vectorize_particles=True, max_plate_nesting=1, **options),
        "num_particles",
        3,
    ),
    "particles at once": (
        lambda **options: SurrogateKD(["x"], num_particles=2, discrete_gradient={"n": "score"}, **options),
        "num_particles",
        3,
    ),
}


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize(("make", "option", "value"), CHANGES.values(), ids=CHANGES)
def test_an_option_that_draws_depend_on_begins_a_pool_of_its_own(make, option, value, is_captured):
    program, calls = freeze(teacher), [(5,)] * 6
    loss, other = make(reuse=2), make(reuse=2)
    if is_captured:
        loss.compile(backend=None)
    steps(loss, program, *calls)
    setattr(loss, option, value)
    setattr(other, option, value)
    assert steps(loss, program, *calls) == steps(other, program, *calls)


def test_draws_of_vectorized_particles_whose_nesting_is_found_out_have_one_pool():
    loss = SurrogateKD(["x"], num_particles=2, vectorize_particles=True, reuse=2)
    pools = []
    steps(loss, teacher, *[(5,)] * 4, before=lambda step: step and pools.append(loss.pair_of(student, teacher).pool))
    assert len(set(map(id, pools))) == 1
    assert loss.pair_of(student, teacher).pool.count == 4


def test_a_teacher_that_reads_values_draws_without_a_graph_and_says_so():
    def program(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            n = pyro.sample("n", dist.Poisson(1.0 if z.sum() > 0 else 2.0))
            pyro.sample("x", dist.Normal(z + 0.1 * n, 0.5))

    captured, calls = SurrogateKD(["x"], reuse=2).compile(backend=None), [(5,)] * 6
    with pytest.warns(
        UserWarning, match="drawing from the teacher of SurrogateKD continues without a graph: the program reads"
    ):
        found = steps(captured, program, *calls)
    assert found == steps(SurrogateKD(["x"], reuse=2), program, *calls)
    assert captured.pair_of(student, program).captured._capture.num_graphs == 1  # the student's own path has none


def test_a_teacher_that_draws_from_python_draws_without_a_graph_and_says_so():
    def program(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            n = pyro.sample("n", dist.Poisson(1.0))
            pyro.sample("x", dist.Normal(z + random.random() + 0.1 * n, 0.5))

    captured = SurrogateKD(["x"], reuse=2).compile(backend=None)
    with pytest.warns(UserWarning, match="drawing from the teacher of SurrogateKD continues without a graph: with the same"):
        steps(captured, program, *[(5,)] * 6)
    assert num_graphs(captured, program) == 0


class Shifted(dist.transforms.Transform):
    """By a function."""

    domain = codomain = dist.constraints.real
    bijective = True

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def _call(self, x):
        return x + self.shift()

    def _inverse(self, y):
        return y - self.shift()

    def log_abs_det_jacobian(self, x, y):
        return torch.zeros_like(x)


def test_a_teacher_whose_distributions_hold_a_new_function_in_each_run_is_told_so():
    def program(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            n = pyro.sample("n", dist.Poisson(1.0))
            pyro.sample("x", dist.TransformedDistribution(dist.Normal(0.1 * n, 0.5), [Shifted(lambda: z)]))

    losses = [SurrogateKD(["x"], divergence=by_draws, reuse=2) for _ in range(2)]
    losses[1].compile(backend=None, max_graphs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        eager, captured = (steps(loss, program, *[(5,)] * 8) for loss in losses)
    assert eager == captured
    (reason,) = [str(each.message) for each in caught if "drawing from the teacher" in str(each.message)]
    assert "holds an object that each run makes anew, such as a function or a module. Make it once" in reason


def by_draws(p, q, value):
    return p.log_prob(value) - q.log_prob(value)
