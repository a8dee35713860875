"""Teacher forcing: for each latent site and row a coin decides between the teacher's value and the shared noise."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_kd import Distiller, LocalKD, check, freeze, site_report
from pyro_kd.losses import run_pair
from pyro_kd.losses.forcing import tossed
from pyro_kd.training import DistillationObjective, linear, switch
from tests.support.losses import SurrogateKD
from tests.support.random_chains import CASES, estimate, exact_kl, random_chain
from tests.support.tutorial_programs import MODULES, NAMES, parameters_of_student

ROWS = 4000


def gaussian(first, second, scale=0.5):
    """z_1 ~ N(first, 1), z_2 ~ N(z_1 + second, 1), y ~ N(z_2, scale^2)."""

    def model(rows=ROWS):
        with pyro.plate("rows", rows):
            z_1 = pyro.sample("z_1", dist.Normal(first, 1.0))
            z_2 = pyro.sample("z_2", dist.Normal(z_1 + second, 1.0))
            pyro.sample("y", dist.Normal(z_2, scale))

    return model


def value_and_gradients(loss, program, params, seed=3):
    pyro.set_rng_seed(seed)
    for param in params.values():
        param.grad = None
    value = loss.loss_and_grads(program.student, program.teacher, *program.args)
    return torch.tensor(value), {name: param.grad for name, param in params.items()}


@pytest.mark.filterwarnings("ignore:pyro.factor .* has no part in the loss")
@pytest.mark.filterwarnings("ignore:the student draws these outside")
@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_at_the_ends_it_is_the_surrogate_loss_and_the_local_loss(module):
    program = module.program()
    params = parameters_of_student(program)
    options = dict(program.options) | {"latent_weight": 1.0}
    for forced, plain in (
        (SurrogateKD(teacher_forcing=0.0, **options), SurrogateKD(**options)),
        (SurrogateKD(teacher_forcing=1.0, **options), LocalKD(**options)),
        (SurrogateKD(teacher_forcing=lambda site: 1.0, **options), LocalKD(**options)),
    ):
        assert_close(value_and_gradients(forced, program, params), value_and_gradients(plain, program, params))


def test_the_expectation_over_coins_is_the_mean_over_patterns():
    """Two latents and one row pattern each: the mean of the four losses, in closed form."""
    student, teacher, rho, weight = gaussian(0.3, -0.5), gaussian(0.0, 0.0), 0.3, 0.2
    first, both, second = 0.3, 0.3 - 0.5, -0.5
    by_pattern = {  # (z_1 given, z_2 given): the terms of z_1, z_2 and y per row, in nats
        (True, True): first**2 / 2 + second**2 / 2,
        (True, False): first**2 / 2 + weight * second**2 / 2 + second**2 / (2 * 0.25),
        (False, True): weight * first**2 / 2 + both**2 / 2,
        (False, False): weight * first**2 / 2 + weight * both**2 / 2 + both**2 / (2 * 0.25),
    }
    expected = sum(
        math.prod(rho if heads else 1 - rho for heads in pattern) * value for pattern, value in by_pattern.items()
    )
    loss = SurrogateKD(["y"], latent_weight=weight, teacher_forcing=rho)
    values = torch.tensor([loss.loss(student, teacher) / ROWS for _ in range(50)])
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - expected) < 4 * error
    assert error < 0.01 * expected


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(("layers", "seed", "families"), CASES[::3])
def test_for_every_probability_it_bounds_the_exact_kl(layers, seed, families, rho):
    teacher, student = random_chain(layers, seed, families), random_chain(layers, seed + 100, families)
    loss = SurrogateKD(["y"], latent_weight=0.0, teacher_forcing=rho)
    mean, error = estimate(loss, student=student, teacher=teacher)
    assert mean + 5 * error >= exact_kl(student=student, teacher=teacher)
    assert error < 0.05 * mean


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.7, 1.0])
def test_for_every_probability_it_bounds_the_exact_kl_of_gaussians(rho):
    """The exact KL is that of N(loc, 2 + scale^2)."""
    exact = (0.5 - 0.5 + 0.4) ** 2 / (2 * 2.25)
    loss = SurrogateKD(["y"], latent_weight=0.0, teacher_forcing=rho)
    values = torch.tensor([loss.loss(gaussian(0.5, -0.1), gaussian(0.0, 0.0)) / ROWS for _ in range(20)])
    assert values.mean() - 4 * values.std() / 20**0.5 > exact


def test_a_coin_is_tossed_for_each_site_and_row():
    def model(loc):
        top = pyro.sample("top", dist.Normal(loc, 1.0))
        with pyro.plate("rows", 1000):
            z = pyro.sample("z", dist.Normal(top, torch.ones(3)).to_event(1))
            with pyro.plate("steps", 5):
                w = pyro.sample("w", dist.Normal(z.sum(-1), 1.0))
                pyro.sample("y", dist.Normal(w, 1.0))

    sites = run_pair(lambda: model(0.0), lambda: model(0.0), targets=["y"]).teacher.nodes
    coins = tossed(sites, ["top", "z", "w"], lambda site: 0.3)
    assert {name: tuple(coin.shape) for name, coin in coins.items()} == {"top": (), "z": (1000,), "w": (5, 1000)}
    rows = torch.cat([coins["z"].unsqueeze(0), coins["w"]]).double()
    assert (rows.mean(1) - 0.3).abs().max() < 5 * (0.21 / 1000) ** 0.5
    assert (torch.corrcoef(rows) - torch.eye(6)).abs().max() < 5 / 1000**0.5


def test_the_student_has_the_teachers_value_where_the_coin_says_so():
    loss = SurrogateKD(["y"], teacher_forcing={"z_1": 0.5, "z_2": 0.0})
    (particle,) = loss.particles(gaussian(1.0, 1.0), gaussian(0.0, 0.0), 100)
    z_1, z_2, y = particle.run.pairs
    given = particle.run.given["z_1"]
    assert 20 < given.sum() < 80
    assert_close(z_1.student_value, torch.where(given, z_1.value, z_1.value + 1.0))
    assert_close(z_2.student_value, z_1.student_value + (z_2.value - z_1.value) + 1.0)
    assert_close(y.student_value, y.value)
    assert "z_2" not in particle.run.given


def test_the_terms_of_given_and_drawn_rows_add_up():
    student, teacher = gaussian(1.0, 1.0), gaussian(0.0, 0.0)
    loss = SurrogateKD(["y"], latent_weight=0.25, given_weight=2.0, teacher_forcing=0.5)
    terms = loss.terms(student, teacher, 1000)
    assert [(term.name, term.kind, term.site, term.weight) for term in terms.values()] == [
        ("z_1", "latent", "z_1", 0.25),
        ("z_1 (given)", "given", "z_1", 2.0),
        ("z_2", "latent", "z_2", 0.25),
        ("z_2 (given)", "given", "z_2", 2.0),
        ("y", "target", "y", 1.0),
    ]
    assert (terms["z_1"].value + terms["z_1 (given)"].value).item() == pytest.approx(500.0)
    assert terms.loss.item() == pytest.approx(sum((term.weight * term.value).item() for term in terms.values()), rel=1e-6)
    report = site_report(loss, student, teacher, 1000, num_samples=3)
    assert [(row.name, row.kind, row.noise) for row in report.sites] == [
        ("z_1", "latent", "direct"),
        ("z_1 (given)", "given", "given"),
        ("z_2", "latent", "direct"),
        ("z_2 (given)", "given", "given"),
        ("y", "target", "given"),
    ]
    assert sum(row.share for row in report.sites) == pytest.approx(1.0)


def test_a_stack_of_sites_has_the_terms_of_its_sites():
    """The steps of a sequence are computed in one stack of distributions."""

    def chain(slope):
        def model():
            z = torch.zeros(50)
            with pyro.plate("rows", 50):
                for step in range(6):
                    z = pyro.sample(f"z_{step}", dist.Normal(slope * z + slope, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0))

        return model

    (particle,) = SurrogateKD(["y"], teacher_forcing=0.5).particles(chain(0.5), chain(1.0))
    terms = {term.name: term.value for term in particle.terms}
    for pair in particle.run.pairs[:-1]:
        value, given = torch.distributions.kl_divergence(pair.p, pair.q), particle.run.given[pair.name]
        assert_close(terms[pair.name], value[~given].sum())
        assert_close(terms[f"{pair.name} (given)"], value[given].sum())


def test_masked_elements_are_never_given():
    mask = torch.arange(100) % 2 == 0

    def model(loc):
        with pyro.plate("rows", 100):
            with pyro.poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0))

    (particle,) = SurrogateKD(["y"], teacher_forcing=0.999).particles(lambda: model(1.0), lambda: model(0.0))
    z, _ = particle.run.pairs
    moved = z.student_value - z.value
    assert_close(moved[~mask], torch.ones(50))
    given = particle.run.given["z"]
    assert_close(moved[mask & given], torch.zeros(int((mask & given).sum())))
    terms = {term.name: term.value.item() for term in particle.terms}
    assert terms["z (given)"] == pytest.approx(0.5 * (mask & given).sum().item())


def test_a_category_is_given_in_the_students_coding():
    def teacher():
        with pyro.plate("rows", 200):
            z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("y", dist.Normal(z.argmax(-1).float(), 1.0))

    def student():
        with pyro.plate("rows", 200):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
            pyro.sample("y", dist.Normal(z.float(), 1.0))

    (particle,) = SurrogateKD(["y"], teacher_forcing=0.5).particles(student, teacher)
    given, trace = particle.run.given["z"], particle.run
    mine, theirs = trace.student.nodes["z"]["value"], trace.teacher.nodes["z"]["value"].argmax(-1)
    assert_close(mine[given].long(), theirs[given])
    assert (mine[~given].long() != theirs[~given]).any()


def test_fresh_sites_and_sites_of_weight_0_are_not_given():
    def student(rows=100):
        with pyro.plate("rows", rows):
            z = pyro.sample("z_1", dist.Normal(0.0, 1.0)) + pyro.sample("own", dist.Normal(0.0, 1.0))
            z = pyro.sample("z_2", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0))

    loss = SurrogateKD(["y"], fresh=["own"], teacher_forcing=1.0, given_weight={"z_1": 0.0, "z_2": 1.0})
    (particle,) = loss.particles(student, gaussian(0.0, 0.0), 100)
    assert set(particle.run.given) == {"z_2", "y"}


@pytest.mark.parametrize("rho", [0.5, lambda site: 0.5, {"z_1": 0.25, "z_2": 0.75}], ids=["number", "function", "mapping"])
@pytest.mark.parametrize("vectorize", [False, True])
def test_particles_have_coins_of_their_own(rho, vectorize):
    options = {"vectorize_particles": vectorize, "max_plate_nesting": 1}
    loss = SurrogateKD(["y"], teacher_forcing=rho, num_particles=3, **options)
    one = SurrogateKD(["y"], teacher_forcing=rho)
    pair = gaussian(0.3, 0.3), gaussian(0.0, 0.0)
    several, single = (torch.tensor([a.loss(*pair, 500) for _ in range(40)]) for a in (loss, one))
    error = (several.var() / 40 + single.var() / 40) ** 0.5
    assert abs(several.mean() - single.mean()) < 4 * error
    assert several.var() < single.var()


class Chain(nn.Module):
    def __init__(self, loc):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([loc, loc]))

    def forward(self, rows):
        gaussian(self.loc[0], self.loc[1])(rows)


def outcomes(loss, student, teacher, rows=100):
    pyro.set_rng_seed(5)
    student.zero_grad()
    value = loss(student, teacher)(rows)
    value.backward()
    return value.detach(), student.loc.grad.clone()


@pytest.mark.parametrize("site_by_site", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_probability_that_changes_needs_no_new_graph(site_by_site, scheduled):
    student, teacher = Chain(1.0), freeze(Chain(0.0))
    eager, captured = SurrogateKD(["y"]), SurrogateKD(["y"]).compile(backend=None)
    for rho in (1.0, 0.7, 0.2, 0.4, 0.0):
        for loss in (eager, captured):
            loss.scheduled = ["teacher_forcing"] if scheduled else []
            loss.teacher_forcing = {"z_1": rho, "z_2": 1.0 - rho} if site_by_site else rho
            loss.given_weight = 1.0 + rho
        assert_close(outcomes(captured, student, teacher), outcomes(eager, student, teacher))
    num_graphs = captured._pairs._pairs[0].captured._capture.num_graphs
    assert num_graphs == (1 if scheduled else 3), "the ends have graphs of their own, unless there is a schedule"


def test_a_loss_that_never_forces_has_no_coins_in_its_graph():
    student, teacher = Chain(1.0), freeze(Chain(0.0))
    captured = SurrogateKD(["y"]).compile(backend=None)
    outcomes(captured, student, teacher)
    after_plain = torch.rand(())
    outcomes(SurrogateKD(["y"]), student, teacher)
    assert torch.rand(()) == after_plain


def test_distiller_follows_its_schedule():
    student, teacher = Chain(1.0), freeze(Chain(0.0))
    seen = []

    class Watched(SurrogateKD):
        def given_sites(self, teacher, targets):
            seen.append(self.teacher_forcing)
            return super().given_sites(teacher, targets)

    loss = Watched(["y"])
    distiller = Distiller(
        student,
        teacher,
        lambda params: torch.optim.Adam(params, lr=0.1),
        loss,
        teacher_forcing=switch(1.0, 0.0, 3),
        log_every=1,
    )
    history = distiller.fit(200, steps=6, progress=False)
    assert sorted(seen, reverse=True) == seen
    assert seen.count(1.0) >= 3
    assert seen.count(0.0) >= 3
    assert loss.teacher_forcing == 0.0, "the loss that was passed stays as it is"
    given, drawn = torch.tensor(history["term/z_1 (given)"]), torch.tensor(history["term/z_1"])
    assert (given[:3] > 0).all()
    assert (drawn[3:] > 0).all()
    assert not drawn[:3].any()
    assert not given[3:].any()
    assert "teacher_forcing" in repr(DistillationObjective(loss, student, teacher, teacher_forcing=linear(1.0, 0.0, 3)))


@pytest.mark.parametrize("options", [{}, {"compile": {"backend": None}}], ids=["eager", "captured"])
def test_distiller_trains_with_it(options):
    student, teacher = Chain(1.0), freeze(Chain(0.0))
    distiller = Distiller(
        student,
        teacher,
        lambda params: torch.optim.Adam(params, lr=0.05),
        SurrogateKD(["y"]),
        teacher_forcing=linear(1.0, 0.0, 60),
        **options,
    )
    distiller.fit(500, steps=120, progress=False)
    assert student.loc.abs().max() < 0.02


def test_a_schedule_for_a_loss_without_teacher_forcing_is_an_error():
    with pytest.raises(TypeError, match="LocalKD has no teacher_forcing to schedule: use SurrogateKD"):
        DistillationObjective(LocalKD(["y"]), Chain(1.0), freeze(Chain(0.0)), teacher_forcing=linear(1.0, 0.0, 10))


def test_the_check_before_training_knows_it():
    report = check(SurrogateKD(["y"], teacher_forcing=0.5), Chain(1.0), freeze(Chain(0.0)), 20)
    assert report.is_ok
    assert [row.name for row in report.sites] == ["z_1", "z_1 (given)", "z_2", "z_2 (given)", "y"]


def test_it_is_shown():
    assert repr(SurrogateKD(["y"], teacher_forcing=0.5)) == (
        "SurrogateKD(targets=['y'], latent_weight=0.1, teacher_forcing=0.5)"
    )
