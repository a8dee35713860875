"""A user's own loss in fifteen lines, with public names only: SVI and Distiller train it, it can be compiled, and reports show it."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_kd import Distiller, check, freeze, site_report
from pyro_kd.errors import NonFiniteLossError, UnknownTargetError
from pyro_kd.losses import DistillationLoss, run_pair, terms_of
from pyro_kd.metrics import marginal_kl
from tests.support.losses import SurrogateKD

ROWS = 64


class BatchSampleKD(SurrogateKD):
    """The K-sample bound. The K samples of each row are the latents of all K rows of the batch."""

    def combine(self, particles):
        bounds = []
        for particle in particles:
            log_p, log_q = 0.0, 0.0
            for pair in particle.run.pairs:
                if pair.is_target:
                    y = pair.value.unsqueeze(1)  # every row's target, under every row's latents
                    log_p = log_p + pair.p.log_prob(y)
                    log_q = log_q + pair.q.log_prob(y)
            bounds.append((log_p.logsumexp(1) - log_q.logsumexp(1)).sum())
        return torch.stack(bounds).mean()


class Coins(nn.Module):
    """A latent bit, and a target whose probability depends on the bit."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Bernoulli(logits=self.logits[z.long()]))


class Registered(Coins):
    """The same student, for Pyro's SVI."""

    def forward(self, rows):
        pyro.module("coins", self)
        super().forward(rows)


def teacher():
    return freeze(Coins(-2.0, 2.0))


def test_the_bound_lies_between_the_exact_kl_and_the_surrogate_bound():
    """The bit has the opposite meaning in the student, so the distributions of y are equal, and only one of the bounds is 0."""
    student = Coins(2.0, -2.0)
    exact = marginal_kl(student, teacher(), ["y"], 2000)
    surrogate = SurrogateKD(["y"], latent_weight=0.0).loss(student, teacher(), 2000) / 2000
    bound = BatchSampleKD(["y"], latent_weight=0.0).loss(student, teacher(), 2000) / 2000
    assert exact.mean == pytest.approx(0.0, abs=1e-6)
    assert surrogate > 1.0
    assert abs(bound) < 0.05


def test_it_equals_the_estimate_by_hand():
    student, loss = Coins(0.5, -1.0), BatchSampleKD(["y"], latent_weight=0.0)
    pyro.set_rng_seed(1)
    run = run_pair(student, teacher(), (ROWS,), targets=["y"])
    (y,) = [pair for pair in run.pairs if pair.is_target]
    by_hand = 0.0
    for row in range(ROWS):
        log_p = [dist.Bernoulli(logits=y.p.logits[k]).log_prob(y.value[row]) for k in range(ROWS)]
        log_q = [dist.Bernoulli(logits=y.q.logits[k]).log_prob(y.value[row]) for k in range(ROWS)]
        by_hand += (torch.stack(log_p).logsumexp(0) - torch.stack(log_q).logsumexp(0)).item()
    pyro.set_rng_seed(1)
    assert loss.loss(student, teacher(), ROWS) == pytest.approx(by_hand, rel=1e-4)


def test_svi_trains_it():
    student = Registered(1.0, 0.5)
    svi = SVI(student, teacher(), pyro.optim.Adam({"lr": 0.05}), loss=BatchSampleKD(["y"], latent_weight=0.0))
    first = sum(svi.step(ROWS) for _ in range(10))
    for _ in range(100):
        svi.step(ROWS)
    assert abs(sum(svi.step(ROWS) for _ in range(10))) < 0.2 * first


@pytest.mark.parametrize("options", [{}, {"compile": {"backend": None}}], ids=["eager", "captured"])
def test_distiller_trains_it(options):
    student = Coins(1.0, 0.5)
    loss = BatchSampleKD(["y"], latent_weight=0.0)
    distiller = Distiller(
        student, teacher(), lambda params: torch.optim.Adam(params, lr=0.05), loss, log_every=10, **options
    )
    history = distiller.fit(ROWS, steps=150, progress=False)
    assert marginal_kl(student, teacher(), ["y"], 2000).mean < 0.01
    losses = torch.tensor(history["loss"])
    assert losses[-20:].mean() < 0.2 * losses[:10].mean(), "logged steps minimise the same loss"


def test_captured_it_equals_the_eager_loss():
    student, loss = Coins(1.0, 0.5), BatchSampleKD(["y"], num_particles=2)
    captured = BatchSampleKD(["y"], num_particles=2)(student, frozen := teacher())
    captured.compile(backend=None)
    for seed in range(3):
        values, gradients = [], []
        for module in (loss(student, frozen), captured):
            pyro.set_rng_seed(seed)
            student.zero_grad()
            value = module(ROWS)
            value.backward()
            values.append(value.item())
            gradients.append(student.logits.grad.clone())
        assert values[0] == pytest.approx(values[1], rel=1e-5)
        assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)
    assert captured.loss._pairs._pairs[0].captured._capture.num_graphs == 1


def test_reports_show_its_value_and_not_the_sum_of_terms():
    student, loss = Coins(2.0, -2.0), BatchSampleKD(["y"], latent_weight=0.0)
    terms = loss.terms(student, teacher(), 1000)
    assert terms["y"].value.item() > 1000
    assert abs(terms.loss.item()) < 100
    assert f"{terms.loss.item():.4g}" in repr(terms).splitlines()[-1]
    report = site_report(loss, student, teacher(), 1000, num_samples=3)
    assert report["y"].term.mean > 1000
    assert abs(report.loss.mean) < 100


def test_combine_gets_all_particles_at_once():
    seen = []

    class Best(SurrogateKD):
        def combine(self, particles):
            seen.append(len(particles))
            return torch.stack([term.value for particle in particles for term in particle.terms]).min()

    student, frozen = Coins(1.0, 0.5), teacher()
    loss = Best(["y"], num_particles=3, latent_weight=0.0)
    value = loss.loss_and_grads(student, frozen, ROWS)
    assert seen[-1] == 3
    assert math.isfinite(value)
    assert student.logits.grad is not None


def test_the_default_is_the_mean_over_particles_of_weighted_terms():
    student, loss = Coins(1.0, 0.5), SurrogateKD(["y"], num_particles=3)
    particles = loss.particles(student, teacher(), ROWS)
    by_hand = sum((term.weight * term.value).item() for particle in particles for term in particle.terms) / 3
    assert loss.combine(particles).item() == pytest.approx(by_hand, rel=1e-6)
    terms = terms_of(particles[0].run, latent_weight=0.1)
    assert [(term.name, term.value.item()) for term in terms] == [
        (term.name, term.value.item()) for term in particles[0].terms if term.weight != 0
    ]


@pytest.mark.parametrize(("returned", "text"), [(torch.ones(3), r"shape \(3,\)"), (1.0, "float")])
def test_a_combine_that_does_not_return_a_scalar_is_an_error(returned, text):
    class Wrong(SurrogateKD):
        def combine(self, particles):
            return returned

    with pytest.raises(TypeError, match=rf"Wrong.combine must return a scalar tensor, not {text}"):
        Wrong(["y"]).loss(Coins(1.0, 0.5), teacher(), ROWS)


@pytest.mark.parametrize("options", [None, {"backend": None}], ids=["eager", "captured"])
def test_a_combine_that_is_nan_is_an_error(options):
    class Nan(SurrogateKD):
        def combine(self, particles):
            return super().combine(particles) * torch.tensor(float("nan"))

    loss = Nan(["y"])
    if options is not None:
        loss.compile(**options)
    with pytest.raises(NonFiniteLossError, match=r"although the term of each site is finite: check combine\(\)"):
        loss(Coins(1.0, 0.5), teacher())(ROWS)


class Longest(SurrogateKD):
    def combine(self, particles):
        return super().combine(particles) * len(particles)


def test_a_compiled_loss_follows_the_number_of_particles():
    student, frozen = Coins(1.0, 0.5), teacher()
    eager, captured = Longest(["y"]), Longest(["y"]).compile(backend=None)
    for count in (2, 4, 1):
        values = []
        for loss in (eager, captured):
            loss.num_particles = count
            pyro.set_rng_seed(0)
            values.append(loss(student, frozen)(ROWS).item())
        assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("weight", [-1.0, "0.5"])
def test_a_compiled_loss_refuses_a_weight_that_an_eager_one_refuses(weight):
    def model(loc):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0))

    loc = torch.tensor(1.0, requires_grad=True)
    loss = SurrogateKD(["y"]).compile(backend=None)
    module = loss(lambda: model(loc), freeze(lambda: model(0.0)))
    module()
    loss.latent_weight = weight
    with pytest.raises((TypeError, ValueError), match="latent_weight of site 'z' is"):
        module()


@pytest.mark.parametrize(
    ("combine", "text"),
    [
        (lambda self, particles: torch.ones(3), "must return a scalar tensor"),
        (lambda self, particles: 1 / 0, "division by zero"),
        (lambda self, particles: SurrogateKD.combine(self, particles).detach(), "depends on no parameter"),
        (lambda self, particles: SurrogateKD.combine(self, particles) / 0, "check combine"),
    ],
    ids=["shape", "error", "detached", "infinite"],
)
def test_the_check_before_training_evaluates_it(combine, text):
    loss = type("Wrong", (SurrogateKD,), {"combine": combine})(["y"])
    report = check(loss, Coins(1.0, 0.5), teacher(), ROWS, try_capture=False)
    assert not report.is_ok
    assert text in report.errors[0].text


def test_the_check_before_training_has_all_particles():
    class Spread(SurrogateKD):
        def combine(self, particles):
            return torch.stack([particle.terms[-1].value for particle in particles]).var()

    assert check(Spread(["y"], num_particles=3), Coins(1.0, 0.5), teacher(), ROWS, try_capture=False).is_ok


def test_a_combine_set_on_an_instance_counts():
    loss, seen = SurrogateKD(["y"], num_particles=3), []
    loss.combine = lambda particles: seen.append(len(particles)) or torch.stack([p.terms[-1].value for p in particles]).sum()
    loss.loss(Coins(1.0, 0.5), teacher(), ROWS)
    assert seen[-1] == 3


class GivingKD(DistillationLoss):
    """Gives what the test says."""

    def __init__(self, given):
        super().__init__(["y"])
        self.given = given

    def given_sites(self, teacher, targets):
        return self.given


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (
            ["y", "code"],
            UnknownTargetError,
            "given_sites returned 'code', not among the teacher's sample sites, which are 'z', 'y'.",
        ),
        (["z"], UnknownTargetError, "given_sites left out the target 'y'."),
        ("y", TypeError, "given_sites must return the names of sites, such as [*targets, 'z'], not 'y'"),
        (None, TypeError, "given_sites must return the names of sites, such as [*targets, 'z'], not None"),
    ],
)
def test_a_wrong_choice_of_given_sites_is_explained(given, error, text):
    loss = GivingKD(given)
    with pytest.raises(error, match=re.escape(text)):
        loss.loss(Coins(0.0, 0.0), teacher(), ROWS)
    assert text in str(check(loss, Coins(0.0, 0.0), teacher(), ROWS))
