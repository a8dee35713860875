"""Latents compared by their values (Eq. 5): the distance of two points on shared noise, and its gradient."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.testing import assert_close

from pyro_kd import LocalKD, freeze
from pyro_kd.divergences import cross_entropy, jensen_shannon, kl, reverse_kl
from pyro_kd.errors import UnknownTargetError, UnsupportedDivergenceError
from pyro_kd.metrics import Estimate
from tests.support.captured import Pair, differ, rows
from tests.support.estimates import assert_within
from tests.support.loss_programs import chain, vector_program
from tests.support.losses import SurrogateKD
from tests.support.runs import only_run, values_of

TEACHER, STUDENT = torch.tensor([0.0, 1.0, -0.7, 2.0]), torch.tensor([0.3, 0.8, -0.5, 1.5])


def by_value(**options):
    return SurrogateKD(["x"], latent_form="value", **options)


@pytest.mark.parametrize("divergence", [kl, reverse_kl])
def test_the_term_is_the_squared_distance_of_the_values(divergence):
    loss = by_value(latent_divergence=divergence)
    (particle,) = loss.particles(chain(STUDENT), chain(TEACHER))
    for term, pair in zip(particle.terms[:2], particle.run.pairs[:2], strict=True):
        assert term.kind == "latent"
        assert term.divergence == "wasserstein2"
        assert term.analytic
        assert_close(term.value, (pair.student_value - pair.value).square().sum())


def test_on_shared_noise_its_mean_is_the_squared_2_wasserstein_distance():
    """z = loc + scale eps: E (z - z')^2 is the square of the difference in loc plus that in scale."""

    def program(loc, scale):
        def model():
            with pyro.plate("rows", 100):
                z = pyro.sample("z", dist.Normal(loc, scale))
                pyro.sample("x", dist.Normal(z, 1.0))

        return model

    terms = [float(by_value().terms(program(0.5, 2.0), program(0.0, 1.0))["z"].value) / 100 for _ in range(200)]
    assert_within(Estimate.of(torch.tensor(terms)), 0.5**2 + 1.0**2)


def test_the_gradient_is_that_of_the_values_at_fixed_noise():
    """By hand: z1' = a + eps_1, z2' = tanh(b z1') + exp(c) eps_2, with the noise of the teacher's run."""
    weight = STUDENT.clone().requires_grad_()
    (particle,) = by_value(latent_weight=1.0).particles(chain(weight), chain(TEACHER))
    total = sum(term.value for term in particle.terms[:2])
    (found,) = torch.autograd.grad(total, weight)

    z1, z2 = (pair.value for pair in particle.run.pairs[:2])
    eps1 = z1 - TEACHER[0]
    eps2 = (z2 - torch.tanh(TEACHER[1] * z1)) / TEACHER[2].exp()
    w = STUDENT.clone().requires_grad_()
    own1 = w[0] + eps1
    own2 = torch.tanh(w[1] * own1) + w[2].exp() * eps2
    (expected,) = torch.autograd.grad(((own1 - z1) ** 2).sum() + ((own2 - z2) ** 2).sum(), w)
    assert_close(found, expected)


def test_targets_are_compared_as_before():
    pyro.set_rng_seed(3)
    ours = SurrogateKD(["x"]).terms(chain(STUDENT), chain(TEACHER))
    pyro.set_rng_seed(3)
    values = by_value().terms(chain(STUDENT), chain(TEACHER))
    assert values["x"].divergence == "kl"
    assert_close(values["x"].value, ours["x"].value)


@pytest.mark.parametrize("options", [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}])
def test_the_loss_is_0_where_student_equals_teacher(options):
    program = chain(TEACHER)
    assert by_value(latent_weight=1.0, **options).loss(program, program) == 0.0


def test_the_students_own_distance_is_given_two_points():
    seen = []

    def absolute(p, q, value):
        seen.append((type(p), p.shape(), q.shape(), value.shape))
        return (p.mean - q.mean).abs()

    loss = by_value(latent_divergence=absolute)
    (particle,) = loss.particles(chain(STUDENT), chain(TEACHER))
    pair = particle.run.pairs[0]
    assert_close(particle.terms[0].value, (pair.student_value - pair.value).abs().sum())
    assert seen[0] == (dist.Delta, torch.Size([50]), torch.Size([50]), torch.Size([50]))


def test_masks_scales_and_the_mean_over_events_enter_as_for_distributions():
    keep = torch.tensor([True, False])
    batch = torch.arange(6) < 4

    def program(shift):
        def model():
            with pyro.plate("rows", 6), poutine.mask(mask=batch), poutine.scale(scale=2.0):
                z = pyro.sample("z", dist.Normal(torch.zeros(2) + shift, 1.0).mask(keep).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0))

        return model

    for reduction, size in (("sum", 1), ("mean", 2)):
        term = by_value(latent_reduction=reduction).terms(program(3.0), program(0.0))["z"]
        assert_close(term.value, torch.tensor(2.0 * 4 * 9.0 / size))


def test_the_form_can_be_chosen_by_site():
    pairs = only_run(SurrogateKD(["x"]), chain(STUDENT), chain(TEACHER)).pairs
    assert [pair.name for pair in pairs] == ["z1", "z2", "x"]
    for form in ({"z1": "conditional", "z2": "value"}, lambda site: "value" if site == "z2" else "conditional"):
        terms = SurrogateKD(["x"], latent_form=form).terms(chain(STUDENT), chain(TEACHER))
        assert [term.divergence for term in terms.values()] == ["kl", "wasserstein2", "kl"]


def test_a_compiled_loss_equals_an_eager_one(one_thread):
    pair = Pair(loss=by_value(latent_weight=0.5))
    before = pair.agree(rows())
    pair.eager.loss.latent_form = pair.captured.loss.latent_form = "conditional"
    assert differ(pair.agree(rows()), before)


def test_it_trains():
    student, _ = vector_program(3)
    teacher = freeze(copy.deepcopy(vector_program(8, "teacher")[0]))
    svi = pyro.infer.SVI(student, teacher, pyro.optim.Adam({"lr": 1e-2}), loss=by_value())
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def coins(probs):
    def model():
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Bernoulli(probs))
            pyro.sample("x", dist.Normal(z, 1.0))

    return model


def test_a_discrete_latent_is_an_error_that_names_the_other_form():
    with pytest.raises(
        UnsupportedDivergenceError, match="site 'z'.*a value of the student's Bernoulli has no derivative"
    ) as error:
        by_value().loss(coins(0.4), coins(0.5))
    assert "latent_form=lambda site: 'conditional' if site == 'z' else 'value'" in str(error.value)
    form = {"z": "conditional"}
    assert values_of(SurrogateKD(["x"], latent_form=form).terms(coins(0.4), coins(0.5)))["z"] > 0


def test_a_loss_that_gives_the_latents_is_an_error():
    with pytest.raises(UnsupportedDivergenceError, match="site 'z1'.*is given the teacher's value.*such as SurrogateKD"):
        LocalKD(["x"], latent_form="value").loss(chain(STUDENT), chain(TEACHER))


@pytest.mark.parametrize("divergence", [cross_entropy, jensen_shannon])
def test_a_divergence_of_densities_is_an_error(divergence):
    with pytest.raises(UnsupportedDivergenceError, match=f"site 'z1'.*{divergence.name} compares densities.*wasserstein2"):
        by_value(latent_divergence=divergence).loss(chain(STUDENT), chain(TEACHER))


def test_a_form_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match=r"latent_form must be 'conditional' \(Eq. 6\) or 'value' \(Eq. 5\), not 'values'"):
        SurrogateKD(["x"], latent_form="values")
    with pytest.raises(TypeError, match="latent_form must be a form, a mapping by site name or a function"):
        SurrogateKD(["x"], latent_form=5)
    with pytest.raises(ValueError, match="latent_form of site 'z1' is 'points', but must be"):
        SurrogateKD(["x"], latent_form=lambda site: "points").loss(chain(STUDENT), chain(TEACHER))
    with pytest.raises(UnknownTargetError, match=r"latent_form has no entry for the latent site 'z2'; it has 'z1'"):
        SurrogateKD(["x"], latent_form={"z1": "value"}).loss(chain(STUDENT), chain(TEACHER))
