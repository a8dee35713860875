"""The control variate of MarginalKD: the same loss on average, with a gradient whose noise vanishes where the programs are equal."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import LocalKD, MarginalKD, freeze
from pyro_kd.errors import PlateMismatchError, UnsupportedDivergenceError
from pyro_kd.metrics import Estimate
from tests.support.gradient_estimates import assert_mean
from tests.support.latent_coins import ROWS, TARGETS, Coins, gradients


class Renamed(Coins):
    """The same law, with the bits before the targets, under other names and in another plate."""

    def forward(self, rows):
        with pyro.plate("lines", rows):
            a = pyro.sample("a", dist.Bernoulli(logits=self.z1)).long()
            y1 = pyro.sample("y1", dist.Bernoulli(logits=self.y1[a])).long()
            b = pyro.sample("b", dist.Bernoulli(logits=self.z2[a])).long()
            pyro.sample("y2", dist.Bernoulli(logits=self.y2[y1, b]))


class SecondFirst(Coins):
    """The second bit first, and the first given the second."""

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z2 = pyro.sample("z2", dist.Bernoulli(0.5)).long()
            z1 = pyro.sample("z1", dist.Bernoulli(logits=self.z2[z2])).long()
            y1 = pyro.sample("y1", dist.Bernoulli(logits=self.y1[z1])).long()
            pyro.sample("y2", dist.Bernoulli(logits=self.y2[y1, z2]))


class Nested(nn.Module):
    """A latent with four states and a vector of bits in an outer plate, and targets in an inner one."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.top, self.bits, self.y = (
            nn.Parameter(torch.randn(4)),
            nn.Parameter(torch.randn(4, 2)),
            nn.Parameter(torch.randn(3)),
        )

    def forward(self, rows):
        with pyro.plate("rows", rows, dim=-2):
            top = pyro.sample("top", dist.Categorical(logits=self.top))
            bits = pyro.sample("bits", dist.Bernoulli(logits=self.bits[top]).to_event(1))
            with pyro.plate("columns", 3, dim=-1):
                inner = pyro.sample("inner", dist.Bernoulli(logits=bits.sum(-1) - 1))
                pyro.sample("y", dist.Bernoulli(logits=self.y * (inner + bits[..., 0])))


def found(loss, student, teacher, count, rows):
    """Values and gradients of many calls, a row each."""
    values, grads = [], []
    for _ in range(count):
        value = loss.differentiable_loss(student, teacher, rows) / rows
        values.append(value.detach())
        grads.append(torch.cat([part.flatten() for part in gradients(student, value)]))
    return torch.stack(values).double(), torch.stack(grads).double()


@pytest.mark.parametrize("make", [Coins, Nested])
def test_value_and_gradient_are_those_of_the_exact_kl(make):
    pyro.set_rng_seed(0)
    student, teacher = make(1), freeze(make(0))
    targets = TARGETS if make is Coins else ["y"]
    values, grads = found(MarginalKD(targets, control_variate=True), student, teacher, 150, 100)
    if make is Coins:
        truth = student.kl_from(Coins(0))
        assert_mean(values, truth.detach().double())
        assert_mean(grads, torch.cat([part.flatten() for part in gradients(student, truth)]).double())
    plain_values, plain = found(MarginalKD(targets), student, teacher, 150, 100)
    assert_mean(values - plain_values, 0.0)
    assert_mean(grads - plain, 0.0)


@pytest.mark.parametrize("make", [Coins, Nested])
def test_where_the_programs_are_equal_every_draw_has_gradient_zero(make):
    targets = TARGETS if make is Coins else ["y"]
    teacher = freeze(make(0))
    _, grads = found(MarginalKD(targets, control_variate=True), make(0), teacher, 3, ROWS)
    _, plain = found(MarginalKD(targets), make(0), teacher, 3, ROWS)
    assert grads.abs().max() < 1e-6
    assert plain.abs().max() > 1e-2


def test_near_the_teacher_its_noise_is_a_fraction():
    pyro.set_rng_seed(0)
    teacher, student = Coins(0), Coins(0)
    with torch.no_grad():
        for param in student.parameters():
            param += 0.1 * torch.randn(param.shape)
    spreads = [
        found(MarginalKD(TARGETS, control_variate=flag), student, freeze(teacher), 60, ROWS)[1].std(0).norm()
        for flag in (True, False)
    ]
    assert spreads[0] < 0.3 * spreads[1]


def test_latents_are_paired_by_site_map():
    pyro.set_rng_seed(0)
    names = {"a": "z1", "b": "z2", "lines": "rows"}
    loss, teacher = MarginalKD(TARGETS, control_variate=True, site_map=names), freeze(Coins(0))
    _, grads = found(loss, Renamed(0), teacher, 3, ROWS)
    assert grads.abs().max() < 1e-6
    student = Renamed(1)
    values, grads = found(loss, student, teacher, 150, 100)
    truth = student.kl_from(Coins(0))
    assert_mean(values, truth.detach().double())
    assert_mean(grads, torch.cat([part.flatten() for part in gradients(student, truth)]).double())


def test_programs_in_different_orders_are_refused():
    """The local loss is the KL of the joint laws only where both are factorised alike."""
    loss = MarginalKD(TARGETS, control_variate=True)
    with pytest.raises(UnsupportedDivergenceError, match="site 'y1' before 'z2', and the student has 'z2' first"):
        loss.loss(SecondFirst(1), freeze(Coins(0)), ROWS)
    assert MarginalKD(TARGETS).loss(SecondFirst(1), freeze(Coins(0)), ROWS) != 0


def test_subsampled_plates_scale_it():
    class Inner(Coins):
        def forward(self, rows):
            with pyro.plate("all", 1000, subsample_size=rows):
                z1 = pyro.sample("z1", dist.Bernoulli(logits=self.z1)).long()
                y1 = pyro.sample("y1", dist.Bernoulli(logits=self.y1[z1])).long()
                z2 = pyro.sample("z2", dist.Bernoulli(logits=self.z2[z1])).long()
                pyro.sample("y2", dist.Bernoulli(logits=self.y2[y1, z2]))

    pyro.set_rng_seed(0)
    loss, student, teacher = MarginalKD(TARGETS, control_variate=True), Inner(1), freeze(Inner(0))
    estimate = Estimate.of(torch.tensor([loss.loss(student, teacher, 50) for _ in range(60)]).double())
    assert abs(estimate.mean - 1000 * student.kl_from(Coins(0)).item()) < 5 * estimate.standard_error


def test_captured_it_equals_the_eager_loss():
    student, teacher = Coins(1), freeze(Coins(0))
    eager, captured = (MarginalKD(TARGETS, control_variate=True)(student, teacher) for _ in range(2))
    captured.compile(backend=None)
    for seed in range(3):
        results = []
        for module in (eager, captured):
            pyro.set_rng_seed(seed)
            value = module(ROWS)
            results.append((value.item(), gradients(student, value)))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert captured.loss._pairs._pairs[0].captured._capture.num_graphs == 1


def test_vectorized_particles_are_averaged():
    pyro.set_rng_seed(0)
    student, teacher = Coins(1), freeze(Coins(0))
    loss = MarginalKD(TARGETS, control_variate=True, num_particles=4, vectorize_particles=True)
    estimate = Estimate.of(torch.tensor([loss.loss(student, teacher, ROWS) / ROWS for _ in range(60)]).double())
    assert abs(estimate.mean - student.kl_from(Coins(0)).item()) < 5 * estimate.standard_error


def test_reports_have_the_same_total():
    pyro.set_rng_seed(0)
    student, teacher = Coins(1), freeze(Coins(0))
    loss = MarginalKD(TARGETS, control_variate=True)
    pyro.set_rng_seed(1)
    value = loss.differentiable_loss(student, teacher, ROWS).item()
    pyro.set_rng_seed(1)
    terms = loss.terms(student, teacher, ROWS)
    assert terms.loss.item() == pytest.approx(value, rel=1e-5)
    assert list(terms) == TARGETS


def test_it_is_the_local_loss_less_the_kl_of_the_posteriors():
    """For a program whose targets say everything about its latents the posteriors are equal, and it is the local loss."""

    def program(heads):
        def model(rows):
            with pyro.plate("rows", rows):
                z = pyro.sample("z", dist.Bernoulli(heads))
                pyro.sample("y", dist.Bernoulli(z))

        return model

    student, teacher = program(torch.tensor(0.3)), freeze(program(torch.tensor(0.6)))
    loss = MarginalKD(["y"], control_variate=True).loss(student, teacher, ROWS)
    assert loss == pytest.approx(LocalKD(["y"]).loss(student, teacher, ROWS), rel=1e-5)


@pytest.mark.parametrize("other", ["enumerate_targets", "cross_entropy"])
def test_options_that_exclude_it(other):
    with pytest.raises(ValueError, match=f"{other} has no .*: leave one out"):
        MarginalKD(TARGETS, control_variate=True, **{other: True})


def test_latents_without_counterparts_are_refused():
    def three(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
            pyro.sample("y", dist.Bernoulli(0.2 + 0.2 * z))

    def two(rows, name="z"):
        with pyro.plate("rows", rows):
            z = pyro.sample(name, dist.Bernoulli(0.4))
            pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * z))

    loss = MarginalKD(["y"], control_variate=True)
    for student in (three, lambda rows: two(rows, "w")):
        with pytest.raises((UnsupportedDivergenceError, PlateMismatchError, Exception), match="z"):
            loss.loss(student, freeze(two), ROWS)
