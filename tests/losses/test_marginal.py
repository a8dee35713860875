"""The exact KL as a loss, against sums over all states: its value and its gradient."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from models.helmholtz import HelmholtzMachine
from pyro_kd import LocalKD, MarginalKD, freeze
from pyro_kd.metrics import Estimate, marginal_kl, marginal_log_prob
from tests.support.latent_coins import ROWS, TARGETS, Coins, gradients
from tests.support.losses import SurrogateKD


def test_enumerated_targets_give_the_exact_kl_and_its_gradient():
    student, teacher = Coins(1), Coins(0)
    loss = MarginalKD(TARGETS, enumerate_targets=True)
    value, expected = loss(student, freeze(teacher))(ROWS), ROWS * student.kl_from(teacher)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, by_hand in zip(gradients(student, value), gradients(student, expected), strict=True):
        assert torch.allclose(found, by_hand, rtol=1e-4, atol=1e-5)


def test_drawn_targets_give_an_unbiased_estimate_of_value_and_gradient():
    student, teacher = Coins(1), Coins(0)
    bound = MarginalKD(TARGETS)(student, freeze(teacher))
    exact = student.kl_from(teacher)
    by_hand = torch.cat([g.flatten() for g in gradients(student, exact)])
    values, found = [], []
    for _ in range(120):
        value = bound(ROWS)
        found.append(torch.cat([g.flatten() for g in gradients(student, value)]) / ROWS)
        values.append(value.item() / ROWS)
    estimate = Estimate.of(torch.tensor(values).double())
    assert abs(estimate.mean - exact.item()) < 5 * estimate.standard_error
    found = torch.stack(found)
    errors = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - by_hand).abs() <= 5 * errors + 1e-6).all()


def test_it_lies_below_both_bounds():
    student, teacher = Coins(3), freeze(Coins(2))
    exact = MarginalKD(TARGETS, enumerate_targets=True).loss(student, teacher, 1000)
    for loss in (SurrogateKD(TARGETS, latent_weight=0.0), LocalKD(TARGETS)):
        bounds = Estimate.of(torch.tensor([loss.loss(student, teacher, 1000) for _ in range(20)]).double())
        assert exact < bounds.mean + 5 * bounds.standard_error


def test_it_is_the_ratio_of_marginal_log_probs():
    torch.manual_seed(0)
    student, teacher = HelmholtzMachine(3).model, freeze(HelmholtzMachine(4).model)
    (particle,) = MarginalKD(["y1", "y2"]).particles(student, teacher, 20)
    data = {pair.name: pair.value for pair in particle.run.pairs}
    expected = (marginal_log_prob(teacher, data, 20) - marginal_log_prob(student, data, 20)).sum()
    assert sum(term.value for term in particle.terms).item() == pytest.approx(expected.item(), rel=1e-4)


def test_equal_laws_with_different_latents_have_loss_zero():
    """The student has one latent of three states and other names, in another coding; the law of the target is the same."""

    def teacher(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.5, 0.5])).to_event(1))
            pyro.sample("y", dist.Categorical(torch.eye(4)[z.sum(-1).long()] * 0.6 + 0.1))

    def student(rows):
        with pyro.plate("rows", rows):
            w = pyro.sample("w", dist.OneHotCategorical(torch.tensor([0.25, 0.5, 0.25])))
            pyro.sample("out", dist.OneHotCategorical(torch.eye(3, 4)[w.argmax(-1)] * 0.6 + 0.1))

    for options in ({}, {"enumerate_targets": True}):
        loss = MarginalKD(["y"], site_map={"out": "y"}, **options)
        assert loss.loss(student, teacher, 50) == pytest.approx(0.0, abs=1e-4)


def test_the_cross_entropy_has_the_same_gradient_for_any_teacher():
    def teacher(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y1", dist.Bernoulli(logits=z))
            pyro.sample("y2", dist.Bernoulli(logits=-z))

    student = Coins(1)
    loss = MarginalKD(TARGETS, cross_entropy=True)
    (particle,) = loss.particles(student, teacher, 30)
    data = {pair.name: pair.value.long() for pair in particle.run.pairs}
    expected = -student.table()[data["y1"], data["y2"]].sum()
    assert loss.combine([particle]).item() == pytest.approx(expected.item(), rel=1e-5)
    for frozen in (freeze(Coins(0)),):
        pyro.set_rng_seed(0)
        one = gradients(student, MarginalKD(TARGETS)(student, frozen)(ROWS))
        pyro.set_rng_seed(0)
        other = gradients(student, loss(student, frozen)(ROWS))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))
    whole = MarginalKD(TARGETS, cross_entropy=True, enumerate_targets=True).loss(student, Coins(0), 1)
    assert whole == pytest.approx(-(Coins(0).table().exp() * student.table()).sum().item(), rel=1e-5)


def test_a_long_chain_needs_the_memory_of_one_transition():
    """30 layers of 4 bits have 16^30 joint states. The law of y by matrix products."""

    def chain(seed, layers=30):
        torch.manual_seed(seed)
        weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(layers)]

        def model(rows):
            with pyro.plate("rows", rows):
                z = pyro.sample("z0", dist.Bernoulli(torch.full((4,), 0.5)).to_event(1))
                for layer in range(1, layers):
                    z = pyro.sample(f"z{layer}", dist.Bernoulli(logits=(z - 0.5) @ weights[layer]).to_event(1))
                pyro.sample("y", dist.Bernoulli(logits=(z - 0.5) @ weights[0]).to_event(1))

        return model, weights

    def law(weights):
        states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
        p = torch.full((16,), 1 / 16)
        for weight in [*weights[1:], weights[0]]:
            p = p @ dist.Bernoulli(logits=((states - 0.5) @ weight).unsqueeze(1)).log_prob(states).sum(-1).exp()
        return p

    (teacher, theirs), (student, own) = chain(0), chain(1)
    exact = (law(theirs) * (law(theirs) / law(own)).log()).sum()
    value = MarginalKD(["y"], enumerate_targets=True, max_states=16**3 * 3)(student, freeze(teacher))(3)
    assert value.item() == pytest.approx(3 * exact.item(), rel=1e-3)
    (found,) = torch.autograd.grad(value, own[5])
    (by_hand,) = torch.autograd.grad(3 * exact, own[5])
    assert torch.allclose(found, by_hand, rtol=1e-2, atol=1e-5)


def test_a_global_latent_and_rows_of_latents():
    """A latent outside of the plate: the plate is one row of the marginal, and the loss is the KL of all its targets together."""

    def program(a, b):
        def model():
            z = pyro.sample("z", dist.Bernoulli(a))
            with pyro.plate("rows", 3):
                w = pyro.sample("w", dist.Bernoulli(0.2 + b * z))
                pyro.sample("y", dist.Bernoulli(0.1 + 0.7 * w))

        return model

    def law(a, b):
        total = []
        for y in itertools.product([0.0, 1.0], repeat=3):
            p = 0.0
            for z in (0, 1):
                w = 0.2 + b * z
                heads = 0.1 + 0.7 * w
                p = p + (a if z else 1 - a) * math.prod(heads if v else 1 - heads for v in y)
            total.append(p)
        return torch.tensor(total).double()

    p, q = law(0.3, 0.6), law(0.6, 0.3)
    exact = float((p * (p / q).log()).sum())
    loss, student, teacher = MarginalKD(["y"]), program(0.6, 0.3), program(0.3, 0.6)
    found = Estimate.of(torch.tensor([loss.loss(student, teacher) for _ in range(100)]).double())
    assert abs(found.mean - exact) < 5 * found.standard_error
    assert marginal_kl(student, teacher, ["y"]).num_samples == 1, "there is one row"


def test_a_subsampled_plate_scales_its_rows():
    teacher, student = Coins(0), Coins(1)

    def inner(coins):
        class Inner(Coins):
            def forward(self):
                with pyro.plate("all", 100, subsample_size=10):
                    z1 = pyro.sample("z1", dist.Bernoulli(logits=self.z1)).long()
                    y1 = pyro.sample("y1", dist.Bernoulli(logits=self.y1[z1])).long()
                    z2 = pyro.sample("z2", dist.Bernoulli(logits=self.z2[z1])).long()
                    pyro.sample("y2", dist.Bernoulli(logits=self.y2[y1, z2]))

        return Inner(coins)

    loss = MarginalKD(TARGETS, enumerate_targets=True)
    assert loss.loss(inner(1), inner(0)) == pytest.approx(100 * student.kl_from(teacher).item(), rel=1e-5)


def test_masked_elements_have_no_term():
    def program(heads):
        def model():
            with pyro.plate("rows", 4):
                z = pyro.sample("z", dist.Bernoulli(heads))
                with pyro.poutine.mask(mask=torch.tensor([True, False, True, False])):
                    pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * z))

        return model

    p, q = 0.5, 0.62
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    loss, student, teacher = MarginalKD(["y"]), program(0.7), program(0.5)
    found = Estimate.of(torch.tensor([loss.loss(student, teacher) for _ in range(60)]).double())
    assert abs(found.mean - 2 * kl) < 5 * found.standard_error


def test_inputs_that_both_programs_observe_have_no_term():
    def program(weight):
        def model(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(weight, 1.0), obs=x)
                z = pyro.sample("z", dist.Bernoulli(logits=x))
                pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * z))

        return model

    x = torch.linspace(-1, 1, 5)
    assert MarginalKD(["y"]).loss(program(3.0), program(0.0), x) == pytest.approx(0.0, abs=1e-5)


def test_point_masses_are_functions_of_other_sites():
    def program(logit):
        def model():
            with pyro.plate("rows", 5):
                z = pyro.sample("z", dist.Bernoulli(logits=logit))
                h = pyro.sample("h", dist.Delta(2 * z - 1))
                pyro.deterministic("twice", 2 * h)
                pyro.sample("y", dist.Bernoulli(logits=h))

        return model

    def heads(logit):
        return dist.Bernoulli(0.5).probs.new_tensor(logit).sigmoid() * math.tanh(0.5) + 1 / (1 + math.e)

    p, q = dist.Bernoulli(heads(0.3)), dist.Bernoulli(heads(-1.0))
    found = MarginalKD(["y"], enumerate_targets=True).loss(program(-1.0), program(0.3))
    assert found == pytest.approx(5 * torch.distributions.kl_divergence(p, q).item(), rel=1e-4)
