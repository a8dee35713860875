"""Handlers of the user's around either program, inside it, and around the loss; reparameterised programs.

As in test_plates.py: the teacher has loc = 0 and the student 1, and the terms are worked out by hand.
"""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib import autoname
from pyro.infer.reparam import (
    DiscreteCosineReparam,
    HaarReparam,
    LatentStableReparam,
    LocScaleReparam,
    StudentTReparam,
    TransformReparam,
)

from pyro_kd import LocalKD, SurrogateKD, freeze
from pyro_kd.errors import ObservedValueError, UnknownTargetError, UnpairedSiteError
from tests.support.runs import only_run

both = pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
particles = pytest.mark.parametrize(
    "options",
    [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}],
    ids=["one", "loop", "vectorized"],
)
TEACHER, STUDENT = torch.tensor(0.0), torch.tensor(1.0)


def program(loc, weight=None):
    """z ~ N(loc, 1), x ~ N(z + loc, 1), four rows; with a parameter if given."""

    def model():
        shift = loc if weight is None else loc + pyro.param("weight", weight)
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            return pyro.sample("x", dist.Normal(z + shift, 1.0))

    return model


def values_of(terms):
    return {name: float(term.value.detach()) for name, term in terms.items()}


PLAIN = {SurrogateKD: {"z": 2.0, "x": 8.0}, LocalKD: {"z": 2.0, "x": 2.0}}

# Handlers that change nothing of what a program computes.


def traced(fn):
    return poutine.trace(fn)


def blocking_parameters(fn):
    return poutine.block(fn, hide_types=["param"])


def blocking_nothing(fn):
    return poutine.block(fn, hide=["nothing"])


def configured(fn):
    return poutine.infer_config(fn, config_fn=lambda site: {"enumerate": "parallel", "mine": 1})


def seeded(fn):
    return poutine.seed(fn, rng_seed=3)


def unconditioned(fn):
    return poutine.uncondition(fn)


def broadcasting(fn):
    return poutine.broadcast(fn)


def markov(fn):
    return poutine.markov(fn)


def conditioned_on_nothing(fn):
    return pyro.condition(fn, data={})


def substituting_nothing(fn):
    return poutine.substitute(fn, data={})


def lifted_from_nothing(fn):
    return poutine.lift(fn, prior={})


def done_to_nothing(fn):
    return pyro.do(fn, data={})


def equalizing_nothing(fn):
    return poutine.equalize(fn, sites=["nothing"])


def reparameterised_nowhere(fn):
    return poutine.reparam(fn, config={})


def escaping_never(fn):
    return poutine.escape(fn, escape_fn=lambda site: False)


def masked_by_true(fn):
    return poutine.mask(fn, mask=True)


def scaled_by_one(fn):
    return poutine.scale(fn, scale=1.0)


def without_gradients(fn):
    return torch.no_grad()(fn)


def partial(fn):
    return functools.partial(fn)


NEUTRAL = [
    traced, blocking_parameters, blocking_nothing, configured, seeded, unconditioned, broadcasting, markov,
    conditioned_on_nothing, substituting_nothing, lifted_from_nothing, done_to_nothing, equalizing_nothing,
    reparameterised_nowhere, escaping_never, masked_by_true, scaled_by_one, without_gradients, partial,
]  # fmt: skip
SIDES = {
    "both": (lambda handler: handler, lambda handler: handler),
    "student": (lambda handler: handler, lambda handler: lambda fn: fn),
    "teacher": (lambda handler: lambda fn: fn, lambda handler: handler),
    "teacher, frozen": (lambda handler: lambda fn: fn, lambda handler: lambda fn: freeze(handler(fn))),
    "frozen teacher": (lambda handler: lambda fn: fn, lambda handler: lambda fn: handler(freeze(fn))),
}


@pytest.mark.parametrize("handler", NEUTRAL, ids=lambda handler: handler.__name__)
@pytest.mark.parametrize("side", SIDES)
@both
def test_handlers_that_change_nothing(loss, handler, side):
    of_student, of_teacher = (choose(handler) for choose in SIDES[side])
    terms = loss(["x"]).terms(of_student(program(STUDENT)), of_teacher(program(TEACHER)))
    assert values_of(terms) == pytest.approx(PLAIN[loss])


# Handlers that change both programs alike. Each gives, for the surrogate and for the local loss, the terms.


def scaled(fn):
    return poutine.scale(fn, scale=3.0)


def masked(fn):
    return poutine.mask(fn, mask=torch.tensor([True, False, False, True]))


def scaled_and_masked(fn):
    return poutine.scale(
        poutine.mask(poutine.scale(fn, scale=2.0), mask=torch.tensor([True, False, False, True])), scale=3.0
    )


def in_a_plate(fn):
    return pyro.plate("outer", 5, dim=-2)(fn)


def in_a_subsampled_plate(fn):
    def model():
        with pyro.plate("outer", 10, subsample_size=2, dim=-2):
            fn()

    return model


def conditioned(fn):
    return pyro.condition(fn, data={"z": torch.full((4,), 7.0)})


def intervened(fn):
    return pyro.do(fn, data={"z": torch.full((4,), 7.0)})


def named(fn):
    return autoname.scope(fn, prefix="top")


CHANGES = {
    scaled: ({"z": 6.0, "x": 24.0}, {"z": 6.0, "x": 6.0}),
    masked: ({"z": 1.0, "x": 4.0}, {"z": 1.0, "x": 1.0}),
    scaled_and_masked: ({"z": 6.0, "x": 24.0}, {"z": 6.0, "x": 6.0}),
    in_a_plate: ({"z": 10.0, "x": 40.0}, {"z": 10.0, "x": 10.0}),
    in_a_subsampled_plate: ({"z": 20.0, "x": 80.0}, {"z": 20.0, "x": 20.0}),
    conditioned: ({"x": 2.0}, {"x": 2.0}),
    intervened: ({"z": 2.0, "x": 2.0}, {"z": 2.0, "x": 2.0}),  # z is drawn, but x depends on 7 instead
    named: ({"top/z": 2.0, "top/x": 8.0}, {"top/z": 2.0, "top/x": 2.0}),
}


@pytest.mark.parametrize("handler", CHANGES, ids=lambda handler: handler.__name__)
@both
@particles
def test_handlers_around_both_programs(loss, handler, options):
    expected = dict(zip((SurrogateKD, LocalKD), CHANGES[handler], strict=True))[loss]
    objective = loss(lambda site: site["name"].endswith("x"), **options)
    student, teacher = handler(program(STUDENT)), handler(program(TEACHER))
    for terms in (objective.terms(student, teacher), objective.terms(student, freeze(teacher))):
        assert values_of(terms) == pytest.approx(expected)


@both
def test_handlers_around_the_loss(loss):
    with poutine.scale(scale=3.0), poutine.mask(mask=torch.tensor([True, False, False, True])):
        terms = loss(["x"]).terms(program(STUDENT), program(TEACHER))
    assert values_of(terms) == pytest.approx({name: 1.5 * value for name, value in PLAIN[loss].items()})


def in_an_outer_plate(loss):
    with pyro.plate("outer", 5, dim=-2):
        return values_of(loss(["x"]).terms(program(STUDENT), program(TEACHER)))


@both
def test_a_plate_around_the_loss(loss):
    expected = {name: 5 * value for name, value in PLAIN[loss].items()}
    with torch.no_grad():
        assert in_an_outer_plate(loss) == pytest.approx(expected)
        with pyro.plate("outer", 5, dim=-2):
            z = only_run(loss(["x"]), program(STUDENT), program(TEACHER)).pairs[0]
    assert z.value.shape == z.student_value.shape == (5, 4)
    assert len(z.value.unique()) == 20  # a draw for each of the plate's rows, and not one repeated


@both
def test_a_plate_around_the_loss_with_gradients(loss):
    assert in_an_outer_plate(loss) == pytest.approx({name: 5 * value for name, value in PLAIN[loss].items()})


@both
def test_a_teacher_conditioned_alone_makes_its_value_the_students_input(loss):
    terms = loss(["x"]).terms(program(STUDENT), conditioned(program(TEACHER)))
    assert values_of(terms) == pytest.approx({"x": 2.0})


def test_a_student_conditioned_alone():
    """The surrogate loss has no draw to compare; the local loss gives the teacher's value in place of the student's own."""
    with pytest.raises(UnpairedSiteError, match="'z' is in the teacher only"):
        SurrogateKD(["x"]).terms(conditioned(program(STUDENT)), program(TEACHER))
    assert values_of(LocalKD(["x"]).terms(conditioned(program(STUDENT)), program(TEACHER))) == pytest.approx(PLAIN[LocalKD])
    terms = SurrogateKD(["x"], fresh=["z"]).terms(conditioned(program(STUDENT)), program(TEACHER))
    assert list(terms) == ["x"]


@both
def test_lifted_parameters_are_latents(loss):
    """poutine.lift turns a parameter into a draw from a prior: the two priors are compared, and noise is shared."""

    def lifted(loc):
        return poutine.lift(program(torch.tensor(0.0), torch.tensor(0.0)), prior={"weight": dist.Normal(loc, 1.0)})

    student, teacher = lifted(STUDENT), lifted(TEACHER)
    run = only_run(loss(["x"]), student, teacher)
    shift = {SurrogateKD: 1.0, LocalKD: 0.0}[loss]
    assert float(run.pairs[0].student_value - run.pairs[0].value) == pytest.approx(shift)
    expected = {SurrogateKD: {"weight": 0.5, "z": 2.0, "x": 8.0}, LocalKD: {"weight": 0.5, "z": 0.0, "x": 0.0}}[loss]
    assert values_of(loss(["x"]).terms(student, teacher)) == pytest.approx(expected)


@both
def test_substituted_parameters_are_used(loss):
    student = poutine.substitute(program(torch.tensor(0.0), torch.tensor(99.0)), data={"weight": torch.tensor(1.0)})
    assert loss(["x"], latent_weight=1.0).loss(student, program(TEACHER)) == pytest.approx(sum(PLAIN[loss].values()))
    teacher = poutine.substitute(program(torch.tensor(0.0), torch.tensor(99.0)), data={"weight": torch.tensor(1.0)})
    assert loss(["x"], latent_weight=1.0).loss(program(2 * STUDENT), teacher) == pytest.approx(sum(PLAIN[loss].values()))


@both
def test_a_seeded_teacher_draws_equal_values_in_every_call(loss):
    def wide(scale):
        def model():
            with pyro.plate("rows", 4):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(scale * z, 1.0))

        return model

    teacher = poutine.seed(wide(1.0), rng_seed=3)
    first, second = (loss(["x"]).loss(wide(2.0), teacher) for _ in range(2))
    assert first == second
    pyro.set_rng_seed(3)
    z = poutine.trace(wide(1.0)).get_trace().nodes["z"]["value"]
    assert first == pytest.approx(float(z.square().sum() / 2))
    one, two = (loss(["x"]).loss(poutine.seed(wide(2.0), rng_seed=3), wide(1.0)) for _ in range(2))
    assert one != two


@pytest.mark.filterwarnings("ignore:the teacher draws these outside", "ignore:the student draws these outside")
def test_blocked_sites_are_private():
    """What a program hides from handlers has no term, and shares noise by its place; a hidden target is an error that names it."""
    hidden = [poutine.block(program(loc), hide=["z"]) for loc in (STUDENT, TEACHER)]
    run = only_run(SurrogateKD(["x"]), *hidden)
    (x,) = run.pairs
    assert "z" not in run.noise
    torch.testing.assert_close(x.q.mean - x.p.mean, torch.full((4,), 2.0))
    with pytest.raises(UnpairedSiteError, match="'z' is in the teacher only"):
        SurrogateKD(["x"]).loss(hidden[0], program(TEACHER))
    with pytest.raises(UnknownTargetError, match="'x' is not a sample site of the teacher, which has 'z'"):
        SurrogateKD(["x"]).loss(program(STUDENT), poutine.block(program(TEACHER), hide=["x"]))


@both
def test_a_trace_inside_a_program(loss):
    """The inner trace sees the values that the shared noise gives, and the sites count as the program's."""

    def outer(loc):
        def model():
            trace = poutine.trace(program(loc)).get_trace()
            pyro.sample("y", dist.Normal(trace.nodes["z"]["value"].sum(), 1.0))

        return model

    terms = loss(["x", "y"]).terms(outer(STUDENT), outer(TEACHER))
    assert values_of(terms) == pytest.approx(PLAIN[loss] | {"y": {SurrogateKD: 8.0, LocalKD: 0.0}[loss]})


def replaying(loc, guide_loc):
    """A program that replays the draws of a blocked program of its own."""

    def model():
        with poutine.block():
            trace = poutine.trace(lambda: pyro.sample("z", dist.Delta(guide_loc.expand(4), event_dim=0))).get_trace()
        poutine.replay(program(loc), trace=trace)()

    return model


def test_a_replay_inside_a_program_keeps_its_values():
    """z is 5 in the teacher and 7 in the student, whatever the noise; its distribution still has a term."""
    terms = SurrogateKD(["x"]).terms(replaying(STUDENT, torch.tensor(7.0)), replaying(TEACHER, torch.tensor(5.0)))
    assert values_of(terms) == pytest.approx({"z": 2.0, "x": 4 * 3.0**2 / 2})


def equalized(loc, **options):
    def model():
        a = pyro.sample("a", dist.Normal(loc, 1.0))
        b = pyro.sample("b", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0))

    return poutine.equalize(model, sites=["a", "b"], **options)


@both
def test_equalized_sites(loss):
    terms = loss(["x"]).terms(equalized(STUDENT), equalized(TEACHER))
    assert values_of(terms) == pytest.approx({"a": 0.5, "x": {SurrogateKD: 2.0, LocalKD: 0.0}[loss]})


def test_equalized_sites_that_keep_their_distribution_observe_a_draw():
    with pytest.raises(ObservedValueError, match="site 'b'"):
        SurrogateKD(["x"]).terms(equalized(STUDENT, keep_dist=True), equalized(TEACHER, keep_dist=True))


@pytest.mark.filterwarnings("ignore:pyro.factor .* has no part in the loss")
@both
def test_unconditioned_programs_with_bookkeeping_sites(loss):
    def observing(loc):
        def model():
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            double = pyro.deterministic("double", 2 * z)
            pyro.factor("penalty", -z)
            pyro.sample("x", dist.Normal(double, 1.0), obs=torch.tensor(1e6))

        return poutine.uncondition(model)

    terms = loss(["x"]).terms(observing(STUDENT), observing(TEACHER))
    assert values_of(terms) == pytest.approx({"z": 0.5, "x": {SurrogateKD: 2.0, LocalKD: 0.0}[loss]})


# One model called twice, names made by scopes and counters.


def step(loc):
    return pyro.sample("z", dist.Normal(loc, 1.0))


def by_scope(loc):
    return autoname.scope(step, prefix="one")(loc) + autoname.scope(step, prefix="two")(loc)


def by_nested_scope(loc):
    with autoname.scope(prefix="outer"):
        return autoname.scope(step, prefix="one")(loc) + autoname.scope(step, prefix="two")(loc)


def by_counting(loc):
    with autoname.name_count():
        return step(loc) + step(loc)


def by_counted_scopes(loc):
    with autoname.name_count():
        return sum(autoname.scope(step, prefix="step")(loc) for _ in range(2))


NAMES = {
    by_scope: ["one/z", "two/z"],
    by_nested_scope: ["outer/one/z", "outer/two/z"],
    by_counting: ["z", "z__1"],
    by_counted_scopes: ["step/z", "step__1/z"],
}


@pytest.mark.parametrize("call", NAMES, ids=lambda call: call.__name__)
@both
@particles
def test_a_model_that_is_called_twice_has_terms_for_both_calls(loss, call, options):
    def twice(loc):
        def model():
            with pyro.plate("rows", 3):
                pyro.sample("x", dist.Normal(call(loc), 1.0))

        return model

    terms = loss(["x"], **options).terms(twice(STUDENT), freeze(twice(TEACHER)))
    expected = dict.fromkeys(NAMES[call], 1.5) | {"x": {SurrogateKD: 6.0, LocalKD: 0.0}[loss]}
    assert values_of(terms) == pytest.approx(expected)


# Reparameterised programs. Each factory returns a program with a latent z of mean loc, and x ~ N(z, 1).


def location(loc, fn, config, event_dim=0):
    def model():
        with pyro.plate("rows", 3):
            z = pyro.sample("z", fn(loc))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(event_dim))

    return poutine.reparam(model, config=config())


def normal(loc):
    return dist.Normal(loc, 2.0)


def vector(loc):
    return dist.Normal(loc * torch.ones(4), 2.0).to_event(1)


def affine(loc):
    return dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.AffineTransform(loc, 2.0)])


def stable(loc):
    return dist.Stable(1.5, 0.2, 1.0, loc)


def decentered(loc):
    return location(loc, normal, lambda: {"z": LocScaleReparam(0.0)})


def half_decentered(loc):
    return location(loc, normal, lambda: {"z": LocScaleReparam(0.5)})


def transformed(loc):
    return location(loc, affine, lambda: {"z": TransformReparam()})


def latent_stable(loc):
    return location(loc, stable, lambda: {"z": LatentStableReparam()})


def cosine(loc):
    return location(loc, vector, lambda: {"z": DiscreteCosineReparam()}, event_dim=1)


def haar(loc):
    return location(loc, vector, lambda: {"z": HaarReparam()}, event_dim=1)


# program -> (latent terms, x of the surrogate loss, x of the local loss); by the mean of z, which differs by 1
REPARAMETERISED = {
    decentered: ({"z_decentered": 0.0}, 1.5, 1.5),
    half_decentered: ({"z_decentered": 3 * 0.25 / (2 * 2)}, 1.5, 3 * (1 - 0.5**0.5) ** 2 / 2),
    transformed: ({"z_base": 0.0}, 1.5, 1.5),
    latent_stable: ({"z_uniform": 0.0, "z_exponential": 0.0}, 1.5, 1.5),
}


@pytest.mark.parametrize("make", REPARAMETERISED, ids=lambda make: make.__name__)
@both
@particles
def test_both_programs_reparameterised(loss, make, options):
    latents, surrogate, local = REPARAMETERISED[make]
    terms = loss(["x"], **options).terms(make(STUDENT), make(TEACHER))
    expected = latents | {"x": {SurrogateKD: surrogate, LocalKD: local}[loss]}
    assert values_of(terms) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("make", "name"), [(cosine, "z_dct"), (haar, "z_haar")], ids=["cosine", "haar"])
@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
def test_both_programs_reparameterised_by_a_linear_map(loss, make, name):
    """The auxiliary draw holds all of z: z differs by the location with shared noise, and not at all where the draw is given."""
    run = only_run(loss(["x"]), make(STUDENT), make(TEACHER))
    assert [pair.name for pair in run.pairs] == [name, "x"]
    auxiliary, x = run.pairs
    expected = torch.tensor({SurrogateKD: 1.0, LocalKD: 0.0}[loss])
    z = run.student.nodes["z"]["value"]
    assert torch.allclose(z - run.teacher.nodes["z"]["value"], expected, atol=1e-5)
    assert torch.allclose(x.q.mean - x.p.mean, expected, atol=1e-5)
    density = dist.Normal(1.0, 2.0).log_prob(z).sum(-1)
    assert torch.allclose(auxiliary.q.log_prob(auxiliary.student_value), density)  # the map is orthonormal


@both
def test_a_decentred_location_is_trained(loss):
    loc = torch.tensor(1.0, requires_grad=True)
    loss(["x"]).differentiable_loss(decentered(loc), freeze(decentered(TEACHER))).backward()
    assert float(loc.grad) == pytest.approx(3.0)


def test_reparameterised_sites_are_not_targets_by_default():
    def observing(loc):
        def model():
            with pyro.plate("rows", 3):
                z = pyro.sample("z", dist.Normal(loc, 2.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

        return poutine.reparam(model, config={"z": LocScaleReparam(0.0)})

    terms = SurrogateKD().terms(observing(STUDENT), observing(TEACHER))
    assert {name: term.kind for name, term in terms.items()} == {"z_decentered": "latent", "x": "target"}


@both
def test_a_reparameterised_student_of_a_plain_teacher(loss):
    """Noise is shared through site_map; the two sites are different variables, which weight 0 leaves uncompared."""
    objective = SurrogateKD(["x"], site_map={"z_decentered": "z"}, latent_weight=0.0)
    plain = location(TEACHER, normal, dict)
    assert objective.loss(decentered(STUDENT), plain) == pytest.approx(1.5)


def test_a_plain_student_of_a_reparameterised_teacher():
    objective = SurrogateKD(["x"], site_map={"z": "z_decentered"}, latent_weight=0.0)
    plain = location(STUDENT, normal, dict)
    assert objective.loss(plain, decentered(TEACHER)) == pytest.approx(1.5)


@both
def test_an_auxiliary_scale_of_a_reparameterised_site_is_shared(loss):
    """StudentTReparam keeps z a draw: Normal given an auxiliary gamma, the same in both programs."""

    def student_t(loc):
        return location(loc, lambda loc: dist.StudentT(4.0, loc, 1.0), lambda: {"z": StudentTReparam()})

    run = only_run(loss(["x"]), student_t(STUDENT), student_t(TEACHER))
    gamma, z, _ = run.pairs
    assert [pair.name for pair in run.pairs] == ["z_gamma", "z", "x"]
    assert torch.equal(gamma.value, gamma.student_value)
    assert torch.allclose(z.q.scale, gamma.value.rsqrt())
    pyro.set_rng_seed(0)
    run = only_run(loss(["x"]), student_t(STUDENT), student_t(TEACHER))
    pyro.set_rng_seed(0)
    terms = values_of(loss(["x"]).terms(student_t(STUDENT), student_t(TEACHER)))
    by_hand = float((run.pairs[0].value / 2).sum())
    assert terms == pytest.approx({"z_gamma": 0.0, "z": by_hand, "x": {SurrogateKD: 1.5, LocalKD: 0.0}[loss]}, rel=1e-5)
