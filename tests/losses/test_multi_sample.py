"""The K-sample bound: its value against enumeration, its limits, and wherever a loss is used."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

from models.helmholtz import HelmholtzMachine
from pyro_kd import Distiller, MultiSampleKD, check, freeze, site_report
from pyro_kd.metrics import marginal_kl
from pyro_kd.utils.estimate import Estimate
from tests.support.captured import MARKS, Pair
from tests.support.estimates import assert_within
from tests.support.losses import SurrogateKD
from tests.support.sampled_coins import WAYS, Coin, bound

each_way = pytest.mark.parametrize("way", WAYS)

STUDENT, TEACHER = (0.4, (-1.0, 1.5)), (-0.6, (2.0, -1.0))


def estimate(loss, student, teacher, rows=1000, repeats=40, *, per=None):
    """The bound a row, with its standard error over runs."""
    values = [loss.loss(student, teacher, rows) / (per or rows) for _ in range(repeats)]
    return Estimate.of(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"latent_weight": 0.5}, {"num_particles": 3}])
def test_one_sample_is_the_surrogate_loss(options):
    student, teacher = Coin(*STUDENT), freeze(Coin(*TEACHER))
    found = []
    for loss in (SurrogateKD(["y"], **({"latent_weight": 0.0} | options)), MultiSampleKD(["y"], num_samples=1, **options)):
        pyro.set_rng_seed(2)
        student.zero_grad()
        found.append((loss.loss_and_grads(student, teacher, 50), student.logits.grad.clone()))
    torch.testing.assert_close(found[1], found[0])


@each_way
@pytest.mark.parametrize("num_samples", [2, 4])
def test_its_mean_is_the_enumerated_bound(way, num_samples):
    student, teacher = Coin(*STUDENT), Coin(*TEACHER)
    loss = MultiSampleKD(["y"], num_samples=num_samples, **WAYS[way])
    assert_within(estimate(loss, student, freeze(teacher), repeats=20), bound(student, teacher, num_samples))


def test_each_row_is_scored_under_the_latents_of_the_rows_before_it():
    student, teacher = Coin(*STUDENT), freeze(Coin(*TEACHER))
    loss = MultiSampleKD(["y"], num_samples=3)
    (particle,) = loss.particles(student, teacher, 12)
    (y,) = [pair for pair in particle.run.pairs if pair.is_target]
    by_hand = 0.0
    for row in range(12):
        p, q = (
            torch.stack([dist.Bernoulli(logits=law.logits[row - k]).log_prob(y.value[row]) for k in range(3)]).logsumexp(0)
            for law in (y.p, y.q)
        )
        by_hand += (p - q).item()
    assert loss.combine([particle]).item() == pytest.approx(by_hand)


def swapped_bound(num_samples):
    """L_K by enumeration, where the bit of the student means the opposite of the teacher's: K samples have n ones."""
    n = torch.arange(num_samples + 1, dtype=torch.float64)
    ones = dist.Binomial(num_samples, torch.tensor(0.5, dtype=torch.float64)).log_prob(n).exp()
    heads = torch.tensor(2.0, dtype=torch.float64).sigmoid()
    p = (n * heads + (num_samples - n) * (1 - heads)) / num_samples
    return float((ones * (p * (p / (1 - p)).log() + (1 - p) * ((1 - p) / p).log())).sum())


def test_the_bound_falls_with_the_number_of_samples_to_the_exact_kl():
    student, teacher = Coin(0.0, (2.0, -2.0)), Coin(0.0, (-2.0, 2.0))
    counts = (1, 2, 8, 64, 256)
    exact = [swapped_bound(count) for count in counts]
    assert exact == sorted(exact, reverse=True)
    assert marginal_kl(student, teacher, ["y"], 10).mean == pytest.approx(0.0, abs=1e-9)
    assert exact[-1] < 0.01 * exact[0]
    for count, truth in zip(counts, exact, strict=True):
        found = estimate(MultiSampleKD(["y"], num_samples=count), student, teacher, repeats=10)
        assert found.mean == pytest.approx(truth) if count == 1 else abs(found.mean - truth) < 5 * found.standard_error


def test_on_the_helmholtz_machine_it_falls_to_the_exact_kl():
    student, teacher = HelmholtzMachine(2), freeze(HelmholtzMachine(4).model)
    with torch.no_grad():
        for param in student.generative.parameters():
            param.mul_(3.0)
    exact = marginal_kl(student.model, teacher, ["y2", "y1"], 20000)
    found = [estimate(MultiSampleKD(["y2", "y1"], num_samples=k), student.model, teacher, 500, 20) for k in (1, 4, 64)]
    for higher, lower in zip(found, [*found[1:], exact], strict=True):
        assert higher.mean - lower.mean > -4 * math.hypot(higher.standard_error, lower.standard_error)
    assert found[0].mean - exact.mean > 10 * math.hypot(found[0].standard_error, exact.standard_error)
    assert abs(found[-1].mean - exact.mean) < 4 * math.hypot(found[-1].standard_error, exact.standard_error) + 1 / 64


@each_way
def test_a_rotation_of_gaussian_latents_costs_nothing(way):
    """z ~ N(0, I), and the student turns z: the distributions of y are equal, and the surrogate bound is not 0."""
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])

    def program(rotation):
        def model(rows):
            with pyro.plate("rows", rows):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("y", dist.Normal(z @ rotation, 1.0).to_event(1))

        return model

    student, teacher = program(turn), freeze(program(torch.eye(2)))
    surrogate = estimate(SurrogateKD(["y"], latent_weight=0.0), student, teacher, 256, 20)
    assert_within(surrogate, 2.0)  # E |z - turned z|^2 / 2
    runs = (256, 20) if way != "loop" else (64, 10)
    few, many = (estimate(MultiSampleKD(["y"], num_samples=k, **WAYS[way]), student, teacher, *runs) for k in (4, 32))
    assert few.mean - many.mean > 5 * math.hypot(few.standard_error, many.standard_error)
    assert many.mean > -5 * many.standard_error
    assert many.mean < 0.25 * surrogate.mean


def two_targets(first, second):
    """y1 depends on z1, z2 on y1, and y2 on z2 and y1."""
    flip = torch.tensor([0.3, 0.8], dtype=torch.float64)  # P(z2 = 1 | y1)

    def model(rows):
        with pyro.plate("rows", rows):
            z1 = pyro.sample("z1", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
            y1 = pyro.sample("y1", dist.Bernoulli(first[z1.long()]))
            z2 = pyro.sample("z2", dist.Bernoulli(flip[y1.long()]))
            pyro.sample("y2", dist.Bernoulli(second[z2.long(), y1.long()]))

    return model


@pytest.mark.parametrize("way", ["plate", "loop"])
def test_targets_that_depend_on_earlier_targets_have_the_enumerated_bound(way):
    firsts = torch.tensor([[0.2, 0.9], [0.6, 0.3]], dtype=torch.float64)
    seconds = torch.tensor([[[0.1, 0.5], [0.8, 0.3]], [[0.4, 0.2], [0.5, 0.9]]], dtype=torch.float64)
    bits = torch.tensor([(z1, low, high) for z1 in (0, 1) for low, high in ((1, 1), (0, 1), (0, 0))])  # z2 at y1 = 0, 1
    chances = torch.tensor([p * q for p in (0.6, 0.4) for q in (0.3, 0.5, 0.2)], dtype=torch.float64)

    def law(first, second):
        """The probability of y1, y2 in each state of the noise, of shape (states, 2, 2)."""
        y1 = torch.stack([1 - first[bits[:, 0]], first[bits[:, 0]]], -1)
        y2 = torch.stack([second[bits[:, 1 + y], y] for y in (0, 1)], -1)
        return y1[..., None] * torch.stack([1 - y2, y2], -1)

    teacher, student = (law(*each) for each in zip(firsts, seconds, strict=True))
    truth = 0.0
    for a in range(6):
        for b in range(6):
            p, q = (each[[a, b]].mean(0) for each in (teacher, student))
            truth += float(chances[a] * chances[b] * (p * (p / q).log()).sum())
    theirs, mine = (two_targets(*each) for each in zip(firsts, seconds, strict=True))
    loss = MultiSampleKD(["y1", "y2"], num_samples=2, **({} if way == "plate" else WAYS[way]))
    assert_within(estimate(loss, mine, freeze(theirs), 1000, 30), truth)


@each_way
@pytest.mark.parametrize("vectorize", [False, True])
def test_it_is_averaged_over_particles(way, vectorize):
    student, teacher = Coin(*STUDENT), Coin(*TEACHER)
    loss = MultiSampleKD(["y"], num_samples=2, num_particles=3, vectorize_particles=vectorize, **WAYS[way])
    assert_within(estimate(loss, student, freeze(teacher), 500, 15), bound(student, teacher, 2))


@pytest.mark.parametrize("way", ["batch", "plate"])
def test_a_subsample_of_rows_stands_for_all(way):
    student, teacher = Coin(*STUDENT), Coin(*TEACHER)

    def program(coin):
        def model(rows):
            with pyro.plate("rows", rows, subsample_size=100):
                z = pyro.sample("z", dist.Bernoulli(logits=coin.prior))
                pyro.sample("y", dist.Bernoulli(logits=coin.logits[z.long()]))

        return model

    loss = MultiSampleKD(["y"], num_samples=2, **WAYS[way])
    assert_within(estimate(loss, program(student), freeze(program(teacher)), 1000), bound(student, teacher, 2))


@pytest.mark.parametrize("way", ["plate", "loop"])
def test_masked_elements_have_no_part(way):
    student, teacher = Coin(*STUDENT), Coin(*TEACHER)
    mask = torch.arange(900) % 3 > 0

    def program(coin):
        return poutine.mask(coin, mask=mask)

    loss = MultiSampleKD(["y"], num_samples=2, **WAYS[way])
    found = estimate(loss, program(student), freeze(program(teacher)), 900, 20, per=600)
    assert_within(found, bound(student, teacher, 2))


@pytest.mark.parametrize("way", ["plate", "loop"])
def test_masked_elements_are_latents_of_what_follows(way):
    """The first bit is hidden, so that the second bit has the bound of a coin behind a coin."""
    student, teacher = Coin(*STUDENT), Coin(*TEACHER)

    def program(coin):
        def model(rows):
            with pyro.plate("rows", rows):
                with poutine.mask(mask=torch.zeros(rows, dtype=torch.bool)):
                    x = pyro.sample("x", dist.Bernoulli(logits=coin.prior))
                pyro.sample("y", dist.Bernoulli(logits=coin.logits[x.long()]))

        return model

    loss = MultiSampleKD(["x", "y"], num_samples=4, **WAYS[way])
    assert_within(estimate(loss, program(student), freeze(program(teacher))), bound(student, teacher, 4))


@each_way
def test_the_latent_terms_are_those_of_the_surrogate_loss(way):
    student, teacher = Coin(*STUDENT), freeze(Coin(*TEACHER))
    values = []
    for weight in (0.0, 0.5):
        pyro.set_rng_seed(1)
        loss = MultiSampleKD(["y"], num_samples=3, latent_weight=weight, **WAYS[way])
        values.append(loss.loss(student, teacher, 100))
    term = SurrogateKD(["y"]).terms(student, teacher, 100)["z"].value.item()
    assert values[1] - values[0] == pytest.approx(0.5 * term)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunks_change_neither_value_nor_gradient_and_hold_less_memory(chunk_size):
    def program(loc):
        with pyro.plate("rows", 60):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
            pyro.sample("y", dist.Normal(z.unsqueeze(-1) + loc, 1.0).to_event(1))

    loc, teacher = torch.full((30,), 0.2, requires_grad=True), freeze(lambda: program(torch.zeros(30)))
    found, held = [], []
    for size in (None, chunk_size):
        pyro.set_rng_seed(1)
        saved = set()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.add(tensor) or tensor, lambda tensor: tensor
        ):
            value = MultiSampleKD(["y"], num_samples=60, chunk_size=size)(lambda: program(loc), teacher)()
        held.append(sum(tensor.numel() for tensor in saved))
        found.append((value.detach(), *torch.autograd.grad(value, loc)))
    torch.testing.assert_close(found[1], found[0])
    assert held[1] < held[0] / 3


@pytest.mark.parametrize("gradient", ["score", "leave_one_out"])
@pytest.mark.parametrize("options", [{"reuse_batch": None}, {"reuse_batch": False}, {"chunk_size": 2}, {"num_particles": 2}])
@MARKS[0]
def test_captured_it_equals_the_eager_loss_in_one_graph(gradient, options):
    student, teacher = Coin(*STUDENT), freeze(Coin(*TEACHER))
    pair = Pair(student, teacher, MultiSampleKD(["y"], num_samples=4, gradient=gradient, **options))
    for _ in range(2):
        pair.agree(20)
    assert pair.captured.loss._pairs._pairs[0].captured._capture.num_graphs == 1


class Registered(Coin):
    """The same, for Pyro's SVI."""

    def forward(self, rows):
        pyro.module("coin", self)
        super().forward(rows)


@each_way
def test_svi_trains_it(way):
    student, teacher = Registered(0.0, (0.5, -0.3)), freeze(Coin(0.0, (-2.0, 1.0)))
    svi = SVI(student, teacher, pyro.optim.Adam({"lr": 0.05}), loss=MultiSampleKD(["y"], num_samples=8, **WAYS[way]))
    before = marginal_kl(student, teacher, ["y"], 2000).mean
    for _ in range(60):
        svi.step(64)
    assert marginal_kl(student, teacher, ["y"], 2000).mean < 0.2 * before


@pytest.mark.parametrize("options", [{}, {"compile": {"backend": None}}], ids=["eager", "captured"])
def test_distiller_trains_it(options):
    student, teacher = Coin(0.0, (1.5, -1.3)), freeze(Coin(0.0, (-2.0, 0.0)))
    loss = MultiSampleKD(["y"], num_samples=16)
    distiller = Distiller(student, teacher, lambda params: torch.optim.Adam(params, lr=0.05), loss, **options)
    before = marginal_kl(student, teacher, ["y"], 2000).mean
    distiller.fit(64, steps=80, progress=False)
    assert marginal_kl(student, teacher, ["y"], 2000).mean < 0.1 * before


@each_way
def test_reports_show_the_terms_of_one_sample_and_the_bound(way):
    student, teacher = Coin(*STUDENT), freeze(Coin(*TEACHER))
    loss = MultiSampleKD(["y"], num_samples=4, **WAYS[way])
    terms = loss.terms(student, teacher, 2000)
    one = SurrogateKD(["y"], latent_weight=0.0).terms(student, teacher, 2000)
    assert terms["y"].value.item() == pytest.approx(one["y"].value.item(), rel=0.1)
    assert terms["z"].value.item() == pytest.approx(one["z"].value.item())
    assert terms.loss.item() < terms["y"].value.item()
    report = site_report(loss, student, teacher, 500, num_samples=3)
    assert report.loss.mean < report["y"].term.mean
    assert check(loss, student, teacher, 100, try_capture=False).is_ok
    assert "num_samples=4" in repr(loss)
