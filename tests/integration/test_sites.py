"""Distributions at a site: events of any rank, conditional flows, plain callables."""

from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch

from pyro_kd import LocalKD, freeze
from pyro_kd.errors import UnsupportedDivergenceError
from tests.support.loss_options import both, particles
from tests.support.losses import SurrogateKD
from tests.support.runs import only_run, runs_of, values_of

# Events of any rank: the same array of 2 x 3 x 4 independent Gaussians, split into plates and event.

SIZES = (2, 3, 4)


def by_to_event(loc, rank):
    return dist.Normal(loc, 1.0).to_event(rank)


def by_to_event_twice(loc, rank):
    return dist.Normal(loc, 1.0).to_event(rank // 2).to_event(rank - rank // 2)


def by_expand(loc, rank):
    return dist.Normal(loc.reshape(-1)[0], 1.0).expand(loc.shape).to_event(rank)


def by_expand_by(loc, rank):
    return dist.Normal(loc.reshape(-1)[0], 1.0).expand_by(loc.shape).to_event(rank)


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("latent", [by_to_event, by_to_event_twice, by_expand, by_expand_by], ids=lambda make: make.__name__)
@both
@particles
def test_events_of_any_rank(loss, options, rank, latent):
    def program(loc):
        def model():
            with ExitStack() as plates:
                for i, size in enumerate(SIZES[: 3 - rank]):
                    plates.enter_context(pyro.plate(f"plate_{i}", size, dim=i - (3 - rank)))
                z = pyro.sample("z", latent(loc * torch.ones(SIZES[3 - rank :]), rank))
                pyro.sample("x", dist.Normal(z + loc, 1.0).to_event(rank))

        return model

    expected = {"z": 12.0, "x": {SurrogateKD: 48.0, LocalKD: 12.0}[loss]}
    objective = loss(["x"], **options)
    assert values_of(objective.terms(program(1.0), program(0.0))) == pytest.approx(expected)
    mean = loss(["x"], latent_reduction="mean", **options).terms(program(1.0), program(0.0))
    assert values_of(mean)["z"] == pytest.approx(12.0 / torch.Size(SIZES[3 - rank :]).numel())
    run = runs_of(objective, program(1.0), program(0.0))[0]
    batch = SIZES[: 3 - rank]
    assert run.pairs[0].p.batch_shape[len(run.pairs[0].p.batch_shape) - len(batch) :] == batch
    assert run.pairs[0].p.event_shape == SIZES[3 - rank :]


# Flows as conditional distributions.


class Shift(dist.conditional.ConditionalTransform):
    """z = 2 eps + weight * context."""

    def __init__(self, weight):
        self.weight = weight

    def condition(self, context):
        return T.AffineTransform(self.weight * context, 2.0)


def flow_program(flow):
    """context -> z by the flow -> x."""

    def model():
        with pyro.plate("rows", 6):
            context = pyro.sample("context", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            z = pyro.sample("z", dist.ConditionalTransformedDistribution(base, [flow]).condition(context))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1))

    return model


@both
def test_a_conditional_flow_by_hand(loss):
    """z ~ N(w c, 4): no closed form for two flows, so the term is the difference of log densities at the teacher's draw."""
    weight = torch.tensor(1.5, requires_grad=True)
    student, teacher = flow_program(Shift(weight)), flow_program(Shift(torch.tensor(0.5)))
    objective = loss(["x"], latent_weight={"context": 1.0, "z": 0.3})
    run = only_run(objective, student, teacher)
    context, z, x = run.pairs
    c, v = context.value, z.value
    shared = {SurrogateKD: v + 1.0 * c, LocalKD: v}[loss]
    assert torch.allclose(z.student_value, shared)
    assert torch.allclose(x.q.mean, shared)
    pyro.set_rng_seed(0)
    terms = objective.terms(student, teacher)
    pyro.set_rng_seed(0)
    value = objective.differentiable_loss(student, teacher)
    pyro.set_rng_seed(0)
    context, z, x = only_run(objective, student, teacher).pairs
    c, v = context.value, z.value
    latent = float(((v - 1.5 * c).square() - (v - 0.5 * c).square()).sum() / 8)
    target = {SurrogateKD: float(c.square().sum() / 2), LocalKD: 0.0}[loss]
    assert values_of(terms) == pytest.approx({"context": 0.0, "z": latent, "x": target}, rel=1e-4)
    (gradient,) = torch.autograd.grad(value, weight)
    by_hand = -0.3 * (c * (v - 1.5 * c)).sum() / 4 + {SurrogateKD: c.square().sum(), LocalKD: 0.0}[loss]
    assert float(gradient) == pytest.approx(float(by_hand), rel=1e-4)


FLOWS = [T.conditional_affine_coupling, T.conditional_affine_autoregressive, T.conditional_spline]
each_flow = pytest.mark.parametrize("make", FLOWS, ids=lambda make: make.__name__)


@each_flow
@both
def test_conditional_flows_share_the_noise_of_their_base(loss, make):
    student_flow, teacher_flow = make(2, 2), make(2, 2)
    objective = loss(["x"], latent_weight=1.0)
    run = only_run(objective, flow_program(student_flow), freeze(flow_program(teacher_flow)))
    context, z, _ = run.pairs
    with torch.no_grad():
        eps = teacher_flow.condition(context.value).inv(z.value.clone())
        through_student = student_flow.condition(context.value)(eps)
        assert not torch.allclose(through_student, z.value, atol=1e-2)
        given = {SurrogateKD: through_student, LocalKD: z.value}[loss]
    assert torch.allclose(z.student_value, given, atol=1e-4)
    objective.differentiable_loss(flow_program(student_flow), freeze(flow_program(teacher_flow))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student_flow.parameters())
    assert any(p.grad.abs().sum() > 0 for p in student_flow.parameters())
    assert all(p.grad is None for p in teacher_flow.parameters())


@each_flow
@particles
def test_conditional_flows_as_targets(make, options):
    """The term is the difference of the log densities that the flows themselves give at the teacher's draw."""
    student_flow, teacher_flow = make(2, 2), make(2, 2)
    objective = SurrogateKD(["z"], max_plate_nesting=1, **options)
    programs = flow_program(student_flow), flow_program(teacher_flow)
    pyro.set_rng_seed(4)
    terms = objective.terms(*programs)
    pyro.set_rng_seed(4)
    total = 0.0
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    for run in runs_of(objective, *programs):
        context, z, _ = run.pairs
        for sign, flow in ((1, teacher_flow), (-1, student_flow)):
            fn = dist.ConditionalTransformedDistribution(base, [flow]).condition(context.value)
            total += sign * float(fn.log_prob(z.value.clone()).sum().detach())
    assert terms["z"].analytic is False
    assert float(terms["z"].value.detach()) == pytest.approx(total / objective.num_particles, rel=1e-3, abs=1e-3)


def planar_programs():
    return flow_program(T.conditional_planar(2, 2)), flow_program(T.conditional_planar(2, 2))


def test_a_flow_without_an_inverse_shares_noise():
    student, teacher = planar_programs()
    objective = SurrogateKD(["x"], latent_weight={"context": 1.0, "z": 0.0})
    pyro.set_rng_seed(0)
    z = only_run(objective, student, teacher).pairs[1]
    assert not torch.equal(z.value, z.student_value)
    by_hand = float((z.student_value - z.value).square().sum().detach() / 2)
    pyro.set_rng_seed(0)
    assert objective.loss(student, teacher) == pytest.approx(by_hand, rel=1e-5)


@both
def test_a_flow_without_an_inverse_is_refused_as_a_target(loss):
    with pytest.raises(UnsupportedDivergenceError, match="site 'z'"):
        loss(["x"]).loss(*planar_programs())


def test_the_terms_leave_out_what_has_weight_0_and_no_density():
    terms = SurrogateKD(["x"], latent_weight={"context": 1.0, "z": 0.0}).terms(*planar_programs())
    assert list(terms) == ["context", "x"]


# Plain callables in place of distributions.


def callable_program(scale):
    def model():
        z = pyro.sample("z", lambda loc: loc + scale * torch.randn(4), 3.0)
        with pyro.plate("rows", 4):
            pyro.sample("x", dist.Normal(z, 1.0))

    return model


def test_callables_are_unpaired_where_fresh():
    run = only_run(SurrogateKD(["x"], fresh=["z"]), callable_program(2.0), callable_program(1.0))
    assert [pair.name for pair in run.pairs] == ["x"]
    assert not torch.allclose(run.student.nodes["z"]["value"] - 3, 2 * (run.teacher.nodes["z"]["value"] - 3))


@both
def test_callables_share_noise_where_they_are_not_compared(loss):
    run = only_run(loss(["x"], latent_weight=0.0), callable_program(2.0), callable_program(1.0))
    student, teacher = run.student.nodes["z"]["value"], run.teacher.nodes["z"]["value"]
    assert torch.allclose(student - 3, 2.0 * (teacher - 3))
    assert "z" in run.noise
