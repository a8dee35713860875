"""The exact KL as a loss: what trains it, captures it and reports it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_kd import Distiller, MarginalKD, check, freeze, site_report, to_inference_data
from tests.support.latent_coins import ROWS, TARGETS, Coins, Registered, gradients, sgd


def test_svi_trains_it():
    student, teacher = Registered(1), freeze(Coins(0))
    svi = SVI(student, teacher, pyro.optim.Adam({"lr": 0.05}), loss=MarginalKD(TARGETS, enumerate_targets=True))
    first = svi.step(ROWS)
    for _ in range(80):
        svi.step(ROWS)
    assert svi.step(ROWS) < 0.1 * first


@pytest.mark.parametrize("options", [{}, {"compile": {"backend": None}}], ids=["eager", "captured"])
def test_distiller_trains_it(options):
    student, teacher = Coins(1), Coins(0)
    distiller = Distiller(student, freeze(teacher), sgd, MarginalKD(TARGETS), log_every=10, **options)
    before = student.kl_from(teacher).item()
    history = distiller.fit(ROWS, steps=100, progress=False)
    assert student.kl_from(teacher).item() < 0.2 * before
    assert {"term/y1", "term/y2"} <= set(history)


@pytest.mark.parametrize("options", [{}, {"num_particles": 3}, {"enumerate_targets": True}, {"cross_entropy": True}])
def test_captured_it_equals_the_eager_loss(options):
    student, teacher = Coins(1), freeze(Coins(0))
    eager, captured = (MarginalKD(TARGETS, **options)(student, teacher) for _ in range(2))
    captured.compile(backend=None)
    for seed in range(3):
        found = []
        for module in (eager, captured):
            pyro.set_rng_seed(seed)
            value = module(ROWS)
            found.append((value.item(), gradients(student, value)))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert captured.loss._pairs._pairs[0].captured._capture.num_graphs == 1


def test_vectorized_particles_are_averaged():
    student, teacher = Coins(1), Coins(0)
    for options in ({"num_particles": 4}, {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 2}):
        loss = MarginalKD(TARGETS, enumerate_targets=True, **options)
        assert loss.loss(student, teacher, ROWS) == pytest.approx(ROWS * student.kl_from(teacher).item(), rel=1e-4)
    guessed = MarginalKD(TARGETS, num_particles=4, vectorize_particles=True, enumerate_targets=True)
    assert guessed.loss(student, teacher, ROWS) == pytest.approx(ROWS * student.kl_from(teacher).item(), rel=1e-4)
    assert guessed.max_plate_nesting == 2


def test_terms_follow_the_chain_rule():
    """The term of y1 is the KL of its own law, and that of y2 the rest."""
    student, teacher = Coins(1), Coins(0)
    terms = MarginalKD(TARGETS, enumerate_targets=True).terms(student, teacher, 10)
    p, q = (module.table().logsumexp(1).detach() for module in (teacher, student))
    first = 10 * float((p.exp() * (p - q)).sum())
    assert list(terms) == TARGETS
    assert terms["y1"].value.item() == pytest.approx(first, rel=1e-4)
    assert terms["y2"].value.item() == pytest.approx(10 * student.kl_from(teacher).item() - first, rel=1e-4)
    assert terms.loss.item() == pytest.approx(10 * student.kl_from(teacher).item(), rel=1e-5)
    assert terms["y1"].analytic is True
    drawn = MarginalKD(TARGETS).terms(student, teacher, 10)
    assert drawn["y2"].analytic is False
    assert sum(term.value.item() for term in drawn.values()) == pytest.approx(drawn.loss.item(), rel=1e-4)


def test_programs_with_their_targets_in_different_orders_have_one_term():
    def program(first, second):
        def model():
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample(first, dist.Bernoulli(0.2 + 0.5 * z))
            pyro.sample(second, dist.Bernoulli(0.7 - 0.3 * z))

        return model

    terms = MarginalKD(["a", "b"], enumerate_targets=True).terms(program("b", "a"), program("a", "b"))
    assert terms["a"].value == 0
    assert terms["b"].value == terms.loss != 0


def test_reports_and_checks_take_it():
    student, teacher = Coins(1), freeze(Coins(0))
    loss = MarginalKD(TARGETS)
    report = site_report(loss, student, teacher, ROWS, num_samples=5)
    assert [(row.name, row.noise, row.divergence) for row in report.sites] == [
        ("y1", "given", "kl"),
        ("y2", "given", "kl"),
    ]
    assert report.unit == "nats"
    assert report["y1"].gradient_norm > 0
    checked = check(loss, student, teacher, ROWS)
    assert checked.is_ok, checked
    assert checked.is_captured
    assert [site.name for site in checked.sites] == TARGETS
    assert not checked.unreached
    assert to_inference_data(loss, student, teacher, 8, num_samples=2) is not None


def test_the_check_before_training_reports_its_problems():
    def continuous(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
            pyro.sample("y1", dist.Bernoulli(logits=z))

    report = check(MarginalKD(["y1"]), continuous, Coins(0), ROWS)
    assert not report.is_ok
    assert "latent site 'z' is Normal, whose values cannot be enumerated" in report.errors[0].text


def test_its_options_are_shown():
    loss = MarginalKD(["y"], enumerate_targets=True, max_states=100)
    assert repr(loss) == "MarginalKD(targets=['y'], enumerate_targets=True, max_states=100)"
