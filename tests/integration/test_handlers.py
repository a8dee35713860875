"""Handlers of the user's that change a program: around either or both, inside it, and around the loss.

The terms are worked out by hand.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib import autoname

from pyro_kd import LocalKD, freeze
from pyro_kd.errors import ObservedValueError, UnknownTargetError, UnpairedSiteError
from tests.support.loss_options import both, particles
from tests.support.losses import SurrogateKD
from tests.support.one_latent import PLAIN, STUDENT, TEACHER, program
from tests.support.runs import only_run, values_of


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


# handler -> (terms of the surrogate loss, terms of the local loss)
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
    with pytest.raises(UnknownTargetError, match="which has 'z', and observes 'x'"):
        SurrogateKD(["y"]).loss(program(STUDENT), poutine.condition(program(TEACHER), {"x": torch.zeros(4)}))


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
