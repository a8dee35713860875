"""Draws of a teacher that serve several steps: which step uses which, and what a loss computes on them."""

import copy
import itertools
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_kd import DrawsKD, LocalKD, MarginalKD, MultiSampleKD, OnPolicyKD, SurrogateKD, freeze
from pyro_kd.errors import UnsupportedGradientError
from pyro_kd.losses.reuse import DrawPool, seeded
from tests.support.counted_rows import teacher


def student(rows, shift=0.0):
    a, b = pyro.param("a", torch.tensor(0.5)), pyro.param("b", torch.tensor(0.1))
    with pyro.plate("rows", rows):
        z = pyro.sample("z", dist.Normal(b, 1.0))
        n = pyro.sample("n", dist.Poisson((a * z).exp()))
        pyro.sample("x", dist.Normal(a * z + 0.1 * n + shift, 0.5))


LOSSES = {
    "surrogate": lambda **options: SurrogateKD(["x"], **options),
    "teacher forcing": lambda **options: SurrogateKD(["x"], teacher_forcing=0.5, **options),
    "local": lambda **options: LocalKD(["x"], **options),
    "implicit": lambda **options: SurrogateKD(["x"], discrete_gradient={"n": "implicit"}, **options),
    "particles": lambda **options: SurrogateKD(
        ["x"], num_particles=2, vectorize_particles=True, max_plate_nesting=1, **options
    ),
    "samples in a plate": lambda **options: MultiSampleKD(["x"], num_samples=3, reuse_batch=False, **options),
    "samples in a loop": lambda **options: MultiSampleKD(
        ["x"], num_samples=3, reuse_batch=False, vectorize=False, **options
    ),
    "samples of the batch": lambda **options: MultiSampleKD(["x"], num_samples=3, **options),
    "draws": lambda **options: DrawsKD(["x"], **options),
}


def gradients(loss, *call):
    for name in ("a", "b"):
        pyro.get_param_store()._params.get(name, torch.zeros(())).grad = None
    value = loss.loss_and_grads(student, teacher, *call)
    return value, *(pyro.get_param_store()._params[name].grad.clone() for name in ("a", "b"))


@pytest.mark.parametrize("reuse", [2, 3, 8])
def test_each_draw_serves_as_many_steps_as_were_asked_for(reuse):
    """And the teacher runs evenly: twice in a round, from the first on. The rounds have 2, 4, ..., 2m steps, and then 2m each."""
    pool, made = DrawPool(reuse), []

    def record(args, kwargs):
        made.append(args[0])
        return args[0]

    rounds = [min(2 * (number + 1), 2 * reuse) for number in range(10 * reuse)]
    served = [pool.next((step,), {}, record) for step in range(sum(rounds))]
    counts = Counter(served)
    assert {counts[draw] for draw in made[: -2 * reuse]} == {reuse}
    ends = list(itertools.accumulate(rounds))
    for end, size in zip(ends, rounds, strict=True):
        assert sum(end - size <= draw < end for draw in made) == 2
        assert len(set(served[end - size : end])) == size


@pytest.mark.parametrize("reuse", [2, 5])
def test_successive_steps_have_different_draws(reuse):
    pool = DrawPool(reuse)
    served = [pool.next((step,), {}, lambda args, _: args[0]) for step in range(400)]
    assert all(one != other for one, other in itertools.pairwise(served))


def test_the_order_is_shuffled_anew_in_each_round():
    pool = DrawPool(4)
    rounds = [[pool.place(12 + 8 * r + k) for k in range(8)] for r in range(6)]
    assert all(sorted(order) == list(range(8)) for order in rounds)
    assert len({tuple(order) for order in rounds}) == 6


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "teacher forcing"])  # which tosses coins in each step
def test_a_step_on_a_kept_draw_is_the_step_on_a_new_one_with_its_seed(name):
    """Bit for bit: value and gradient."""
    loss, plain = LOSSES[name](reuse=2), LOSSES[name]()
    place = None
    while place is None or place.uses == 0:
        gradients(loss, 8)
        pool = loss.pair_of(student, teacher).pool
        place = pool.places[pool.place(pool.count)]
    found = gradients(loss, 3)  # other arguments, which a kept draw ignores
    gradients(plain, 8)  # what a first call finds out
    with seeded(place.seed):
        drawn = gradients(plain, 8)
    assert all(torch.equal(torch.as_tensor(one), torch.as_tensor(other)) for one, other in zip(found, drawn, strict=True))


def test_a_compiled_loss_has_the_gradients_of_an_eager_one():
    found = []
    for options in (None, {"backend": None}):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = SurrogateKD(["x"], reuse=2, teacher_forcing=0.5)
        if options is not None:
            loss.compile(**options)
        found.append([gradients(loss, 6) for _ in range(12)])
        assert options is None or loss.pair_of(student, teacher).captured._capture.num_graphs == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close([torch.as_tensor(x) for x in one], [torch.as_tensor(x) for x in other])


class Interval(torch.nn.Module):
    """Its first distribution holds the module's own buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("low", torch.tensor(-1.0))
        self.register_buffer("high", torch.tensor(1.0))

    def model(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Uniform(self.low, self.high))
            pyro.sample("x", dist.Normal(z, 0.5))


def test_a_draw_holds_no_tensor_of_the_teacher():
    """So it stays as it was drawn, and a compiled loss can be given it beside the teacher."""
    interval = Interval()

    def shifted(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Uniform(interval.low, interval.high))
            pyro.sample("x", dist.Normal(z + pyro.param("loc", torch.tensor(0.5)), 0.5))

    found = []
    for loss in (SurrogateKD(["x"], reuse=2), SurrogateKD(["x"], reuse=2).compile(backend=None)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        frozen = freeze(interval.model)
        values = [loss.differentiable_loss(shifted, frozen, 4) for _ in range(4)]  # without a graph there would be a warning
        found.append(torch.stack(values).detach())
        draw = loss.pair_of(shifted, frozen).pool.places[0].draw
        assert not {id(tensor) for tensor in draw.tensors} & {id(tensor) for tensor in frozen.tensors()}
    assert torch.equal(*found)


def test_a_draw_keeps_its_arguments_though_the_caller_changes_them():
    shift = torch.zeros(4)
    loss = SurrogateKD(["x"], reuse=2)
    for step in range(8):
        shift.fill_(float(step))
        loss.loss_and_grads(student, teacher, 4, shift)
    places = loss.pair_of(student, teacher).pool.places
    assert {float(place.call[0][1][0]) for place in places} <= set(map(float, range(8)))
    for place in places:
        sites = {site.name: site for site in place.draw.unpacked[2][0].nodes}
        assert torch.allclose(sites["x"].fn.loc, sites["z"].value + 0.1 * sites["n"].value + place.call[0][1])


def test_what_takes_no_gradient_draws_anew():
    loss = SurrogateKD(["x"], reuse=4)
    loss.loss_and_grads(student, teacher, 4)
    before = loss.pair_of(student, teacher).pool.count
    values = {loss.loss(student, teacher, 4) for _ in range(4)}
    loss.terms(student, teacher, 4)
    with torch.no_grad():
        loss(student, teacher)(4)
    assert len(values) == 4
    assert loss.pair_of(student, teacher).pool.count == before


def test_svi_trains_with_an_eighth_of_the_teachers_runs():
    calls = []

    def counted(rows):
        calls.append(1)
        teacher(rows)

    svi = SVI(student, counted, pyro.optim.Adam({"lr": 0.05}), SurrogateKD(["x"], reuse=8, teacher_forcing=0.0))
    svi.step(16)
    calls.clear()
    for _ in range(2 + 4 + 6 + 8 + 10 + 12 + 14 + 16 + 64 - 1):
        svi.step(16)
    assert len(calls) == 15 + 8  # the pool, and then one in eight


def test_copies_of_a_loss_have_draws_of_their_own():
    loss = SurrogateKD(["x"], reuse=2)
    loss.loss_and_grads(student, teacher, 4)
    assert copy.deepcopy(loss).pair_of(student, teacher).pool is None
    assert "reuse=2" in repr(loss)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MarginalKD(["x"], reuse=2), TypeError, "MarginalKD takes no reuse: it runs the teacher on all states"),
        (lambda: OnPolicyKD(["x"], reuse=2), TypeError, "OnPolicyKD takes no reuse: the teacher runs on histories"),
        (lambda: SurrogateKD(["x"], reuse=0), ValueError, "reuse must be at least 1"),
        (lambda: SurrogateKD(["x"], reuse=2.0), TypeError, "reuse must be a whole number of steps"),
        (lambda: SurrogateKD(["x"], reuse=True), TypeError, "reuse must be a whole number of steps"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("call", [lambda x: ((x,), {}), lambda x: (([x, 1],), {}), lambda x: ((), {"x": x})])
def test_an_argument_that_requires_a_gradient_is_an_error(call):
    """An encoder before the loss would not be trained."""

    def program(x):
        (x,) = x[:1] if isinstance(x, list) else (x,)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(x * pyro.param("a", torch.tensor(1.0)), 1.0))

    args, kwargs = call(torch.ones(3, requires_grad=True))
    loss = SurrogateKD(["x"], reuse=2)
    with pytest.raises(UnsupportedGradientError, match=r"argument (0|'x') requires a gradient.* Leave out reuse"):
        loss.differentiable_loss(program, freeze(program), *args, **kwargs)
    args, kwargs = call(torch.ones(3))
    assert loss.differentiable_loss(program, freeze(program), *args, **kwargs).requires_grad


def test_a_distribution_that_holds_a_module_can_be_reused():
    flow = dist.transforms.affine_autoregressive(2, hidden_dims=[4])

    def with_flow(rows):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow]))

    def own(rows):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(pyro.param("m", torch.zeros(2)), 1.0).to_event(1))

    loss = SurrogateKD(["x"], reuse=2)
    frozen = freeze(with_flow)
    assert all(abs(loss.loss_and_grads(own, frozen, 4)) < 100 for _ in range(8))


@pytest.mark.parametrize("options", [None, {"backend": None}], ids=["eager", "captured"])
def test_draws_of_a_teacher_whose_parameters_in_the_store_change_are_made_anew(options):
    """In place, or by another tensor; the pool gave draws of the teacher as it was."""

    def located(name):
        def program(rows):
            with pyro.plate("rows", rows):
                pyro.sample("x", dist.Normal(pyro.param(name, torch.tensor(0.0)), 1.0))

        return program

    own, theirs = located("own"), located("theirs")
    loss = SurrogateKD(["x"], reuse=2)
    if options is not None:
        loss.compile(**options)
    pools = []
    for change in (None, lambda: pyro.param("theirs").data_ptr(), lambda: pyro.param("theirs").detach().add_(3.0), replaced):
        if change is not None:
            change()
        values = [loss.loss_and_grads(own, theirs, 4) / 4 for _ in range(6)]
        pools.append(loss.pair_of(own, theirs).pool)
        assert values == pytest.approx([pyro.param("theirs").item() ** 2 / 2] * 6)
        pyro.param("own").data.zero_()
    assert [one is other for one, other in itertools.pairwise(pools)] == [True, False, False]


def replaced():
    pyro.get_param_store()["theirs"] = torch.tensor(-1.0)
