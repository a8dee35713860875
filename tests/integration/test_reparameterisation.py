"""Reparameterised programs: the terms of auxiliary sites are those worked out by hand.

The teacher has loc = 0 and the student 1. Each factory returns a program with a latent z of mean loc, and x ~ N(z, 1).
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import (
    DiscreteCosineReparam,
    HaarReparam,
    LatentStableReparam,
    LocScaleReparam,
    StudentTReparam,
    TransformReparam,
)
from pyro.infer.reparam.strategies import AutoReparam

from pyro_kd import LocalKD, freeze
from pyro_kd.errors import UnknownTargetError
from tests.support.loss_options import both, particles
from tests.support.losses import SurrogateKD
from tests.support.one_latent import STUDENT, TEACHER
from tests.support.runs import only_run, values_of


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
    assert objective.loss(decentered(STUDENT), plain(TEACHER)) == pytest.approx(1.5)


def test_a_plain_student_of_a_reparameterised_teacher():
    objective = SurrogateKD(["x"], site_map={"z": "z_decentered"}, latent_weight=0.0)
    assert objective.loss(plain(STUDENT), decentered(TEACHER)) == pytest.approx(1.5)


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


def plain(loc):
    return location(loc, normal, dict)


def automatic(program):
    return poutine.reparam(program, config=AutoReparam())


def but_for_x(program):
    reparam = AutoReparam()
    return poutine.reparam(program, config=lambda site: None if site["name"] == "x" else reparam(site))


@pytest.mark.parametrize("whose", ["teacher", "student"])
@both
def test_a_target_that_a_reparam_made_a_point_mass_is_an_error(loss, whose):
    """Its term was 0, masked, or an error that did not name the reparam."""
    teacher = automatic(plain(TEACHER)) if whose == "teacher" else plain(TEACHER)
    message = f"target 'x' is no draw in the {whose}: poutine.reparam has made it a point mass .* Leave it out of the config"
    with pytest.raises(UnknownTargetError, match=message):
        loss(["x"]).loss(automatic(plain(STUDENT)), teacher)


@both
def test_targets_left_out_of_an_automatic_reparam(loss):
    terms = loss(["x"]).terms(but_for_x(plain(STUDENT)), freeze(but_for_x(plain(TEACHER))))
    assert terms["x"].kind == "target"
    assert "z_decentered" in values_of(terms)
