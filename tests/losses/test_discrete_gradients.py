"""Gradients through discrete latents, held to enumeration. Two programs on the same noise have finitely many pairs of values."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from tests.support.coupled_chains import BINOMIALS, BITS, CATEGORIES, GEOMETRIC, POISSON
from tests.support.losses import SurrogateKD

pytestmark = pytest.mark.usefixtures("float64")

CHAINS = {"bits": BITS, "binomials": BINOMIALS, "poisson": POISSON, "geometric": GEOMETRIC, "categories": CATEGORIES}
KINDS = ("implicit", "boundary", "boundary_all", "score")
UNBIASED = KINDS[1:]
VECTORISED = {"num_particles": 3, "vectorize_particles": True}


def deviations(estimates, truth):
    """The errors of a mean in units of its standard errors, one for each weight. Estimates without any spread must be exact."""
    error, spread = estimates.mean(0) - truth, estimates.std(0) / len(estimates) ** 0.5
    fixed = spread < 1e-12
    assert torch.allclose(error[fixed], torch.zeros(()), atol=1e-9)
    return (error / spread)[~fixed]


def assert_unbiased(estimates, truth):
    assert deviations(estimates, truth).abs().max() < 5


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "score") for name in CHAINS),
        *((name, "boundary") for name in CHAINS),
        ("bits", "boundary_all"),
    ],
)
def test_boundary_and_score_are_unbiased(name, kind):
    assert_unbiased(CHAINS[name].gradients(kind), CHAINS[name].exact_gradient())


@pytest.mark.parametrize("name", CHAINS)
def test_a_cut_gradient_is_not(name):
    """So the test above has power."""
    estimates, truth = CHAINS[name].gradients("cut", number=20), CHAINS[name].exact_gradient()
    error, spread = estimates.mean(0) - truth, estimates.std(0) / len(estimates) ** 0.5
    assert (error.abs() > 15 * spread + 1e-3).any()


@pytest.mark.parametrize("name", ["binomials", "poisson", "geometric"])
def test_an_implicit_gradient_of_counts_is_closer_than_a_cut_one(name):
    truth = CHAINS[name].exact_gradient()
    errors = {kind: (CHAINS[name].gradients(kind, number=15).mean(0) - truth).norm() for kind in ("cut", "implicit")}
    assert errors["implicit"] < errors["cut"] / 2


@pytest.mark.parametrize("options", [{"num_particles": 3}, VECTORISED], ids=["loop", "vectorised"])
@pytest.mark.parametrize("kind", ["boundary", "score"])
def test_particles_are_unbiased(kind, options):
    assert_unbiased(BITS.gradients(kind, rows=200, **options), BITS.exact_gradient())


def test_other_particles_are_a_baseline_that_lowers_the_variance_of_the_score():
    spread = {count: BITS.gradients("score", rows=1, number=60, num_particles=count)[:, :2].std(0) for count in (1, 4)}
    assert (spread[4] < spread[1] / 3).all()  # 1/2 by the mean of four alone


def test_each_site_has_the_gradient_that_a_mapping_or_a_function_gives_it():
    truth = BITS.exact_gradient()
    assert_unbiased(BITS.gradients({"z0": "score", "z1": "boundary"}), truth)
    assert_unbiased(BITS.gradients(lambda name: "boundary" if name == "z0" else "score"), truth)
    second_alone = BITS.gradients({"z1": "boundary_all"})
    assert_unbiased(second_alone[:, 2:], truth[2:])
    assert torch.equal(second_alone[0, :2], BITS.gradients("cut", number=1)[0, :2])


@pytest.mark.parametrize("kind", ["boundary", "score"])
def test_rows_that_meet_in_a_later_site_are_not_taken_for_independent(kind):
    """The two units of a layer, as two rows of an inner plate that the target lies outside of."""
    chain = replace(
        BITS, layers=BITS.layers[:1], units=(2,), target=lambda w, z: dist.Bernoulli(logits=w[5] + w[6] * z.prod(-1))
    )

    def program(w):
        with pyro.plate("batch", 400, dim=-2):
            with pyro.plate("units", 2, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(logits=w[0:2]))
            pyro.sample("y", dist.Bernoulli(logits=w[5] + w[6] * z.prod(-1, keepdim=True)))

    estimates = gradients_of(program, chain.student, chain.teacher, kind, latent_weight=0.7, per=400)
    assert_unbiased(estimates, chain.exact_gradient())


def gradients_of(program, student, teacher, kind, *, per, number=30, teacher_program=None, **options):
    w, other = torch.tensor(student, requires_grad=True), torch.tensor(teacher)
    loss = SurrogateKD(["y"], discrete_gradient=kind, **options)
    module = loss(lambda: program(w), lambda: (teacher_program or program)(other))
    return torch.stack([torch.autograd.grad(module(), w)[0] / per for _ in range(number)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "family", [lambda logits: dist.Bernoulli(logits=logits), lambda logits: dist.Binomial(4, logits=logits)]
)
def test_a_fresh_latent_is_differentiated_too(kind, family):
    """The rest of the loss is quadratic in the latent, and does not depend on its noise: so the implicit gradient is exact as well."""

    def student(w):
        with pyro.plate("rows", 400):
            z = pyro.sample("own", family(w[0]))
            pyro.sample("y", dist.Normal(w[1] * z, 1.0))

    def teacher(w):
        with pyro.plate("rows", 400):
            pyro.sample("y", dist.Normal(w[0], 1.0))

    w = torch.tensor([0.3, 0.8], requires_grad=True)
    z = family(w[0]).enumerate_support()
    exact = (family(w[0]).log_prob(z).exp() * (w[1] * z - 0.5) ** 2 / 2).sum()
    estimates = gradients_of(student, [0.3, 0.8], [0.5], kind, per=400, teacher_program=teacher, fresh=["own"])
    assert_unbiased(estimates, torch.autograd.grad(exact, w)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_the_teachers(kind):
    def program(name):
        def model(w):
            with pyro.plate("rows", 50):
                z = pyro.sample(name, dist.Bernoulli(logits=w))
                pyro.sample("y", dist.Normal(z, 1.0))

        return model

    found = []
    for option in (kind, {"z": kind}, lambda name: {"z": kind}[name]):
        pyro.set_rng_seed(0)
        options = {"site_map": {"mine": "z"}, "latent_weight": 0.0}  # so that w has no other gradient
        found.append(
            gradients_of(program("mine"), 0.3, -0.5, option, per=50, number=3, teacher_program=program("z"), **options)
        )
    assert found[0].abs().sum() > 0
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", UNBIASED)
def test_both_codings_of_categories_have_the_same_gradient(kind):
    means = torch.tensor([0.5, -1.0, 2.0])

    def indices(w):
        with pyro.plate("rows", 20):
            z = pyro.sample("z", dist.Categorical(logits=w).expand([2]).to_event(1))
            pyro.sample("y", dist.Normal(means[z].sum(-1), 1.0))

    def one_hot(w):
        with pyro.plate("rows", 20):
            z = pyro.sample("z", dist.OneHotCategorical(logits=w).expand([2]).to_event(1))
            pyro.sample("y", dist.Normal((z * means).sum((-1, -2)), 1.0))

    found = []
    for program in (indices, one_hot):
        pyro.set_rng_seed(0)
        student, teacher = [0.1, 0.4, -0.3], [0.5, -0.2, 0.0]
        found.append(gradients_of(program, student, teacher, kind, per=20, number=2, latent_weight=0.0))
    assert found[0].abs().sum() > 0
    assert torch.allclose(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_of_the_loss_is_that_of_a_cut_one(kind):
    w, teacher = torch.tensor(BINOMIALS.student, requires_grad=True), torch.tensor(BINOMIALS.teacher)
    values = []
    for option in ("cut", kind):
        pyro.set_rng_seed(0)
        loss = SurrogateKD(["y"], discrete_gradient=option)
        values.append(loss.differentiable_loss(lambda: BINOMIALS.model(w, 20), lambda: BINOMIALS.model(teacher, 20)))
    assert torch.equal(*values)
