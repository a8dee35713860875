"""Gradients where a formula has a kink or an infinity of its own, which the divergence has not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import LocalKD
from pyro_kd.divergences import kl, reverse_kl


def gradient(divergence, make, teacher, student):
    """Of the divergence of ``make(teacher)`` and ``make(student)`` with respect to the student's parameters."""
    own, theirs = torch.tensor(student).double().requires_grad_(), torch.tensor(teacher).double()
    pyro.set_rng_seed(0)
    value = LocalKD(["x"], divergence=divergence)(lambda: drawn(make(own)), lambda: drawn(make(theirs)))()
    return torch.autograd.grad(value, own)[0].tolist()


def drawn(law):
    pyro.sample("x", law if law.batch_shape == () else law.to_event(1))


@pytest.mark.parametrize("teacher", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("student", [0.0, -0.0])
def test_reverse_kl_of_a_bit_at_logit_zero(teacher, student):
    found = gradient(reverse_kl, lambda p: dist.Bernoulli(logits=p), [teacher], [student])
    assert found == pytest.approx([-teacher / 4])


def test_kl_of_a_bit_at_logit_zero():
    assert gradient(kl, lambda p: dist.Bernoulli(logits=p), [2.0], [0.0])[0] == pytest.approx(
        0.5 - torch.sigmoid(torch.tensor(2.0)).item(), abs=1e-6
    )


INF = float("inf")
IMPOSSIBLE = {
    "categorical, logits": (lambda p: dist.Categorical(logits=p), [0.1, 0.2, -INF], [0.5, -0.3, -INF]),
    "one-hot, logits": (lambda p: dist.OneHotCategorical(logits=p), [0.1, 0.2, -INF], [0.5, -0.3, -INF]),
    "categorical, probs": (lambda p: dist.Categorical(p), [0.4, 0.6, 0.0], [0.5, 0.5, 0.0]),
    "bits, probs": (lambda p: dist.Bernoulli(p), [0.3, 0.0, 1.0], [0.4, 0.0, 1.0]),
    "counts, probs": (lambda p: dist.Binomial(3, p), [0.3, 0.0, 1.0], [0.4, 0.0, 1.0]),
    "failures, probs": (lambda p: dist.Geometric(p), [0.3, 1.0], [0.4, 1.0]),
}


@pytest.mark.parametrize("divergence", [kl, reverse_kl])
@pytest.mark.parametrize(("make", "teacher", "student"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_neither_program_does_has_no_gradient(make, teacher, student, divergence):
    found = gradient(divergence, make, teacher, student)
    assert all(value == value and abs(value) < INF for value in found)
    possible = [index for index, (p, q) in enumerate(zip(teacher, student, strict=True)) if abs(p) < INF and 0 != q != 1]
    alone = gradient(divergence, make, [teacher[index] for index in possible], [student[index] for index in possible])
    assert [found[index] for index in possible] == pytest.approx(alone, abs=1e-6)


def test_counts_for_bits_that_are_never_set():
    """The rate is added to the divergence, whatever the bits; one that is 0 and has never to count has no other gradient."""
    rate = torch.tensor([0.0, 2.0, 2.0], requires_grad=True)
    value = kl(dist.Bernoulli(torch.tensor([0.0, 0.0, 1.0])), dist.Poisson(rate), torch.zeros(3))
    assert value.tolist() == pytest.approx([0.0, 2.0, 2.0 - math.log(2.0)])
    assert torch.autograd.grad(value.sum(), rate)[0].tolist() == pytest.approx([1.0, 1.0, 0.5])


def test_bits_that_are_never_set_for_counts():
    probs = torch.tensor([0.0, 1.0, 0.25], requires_grad=True)
    value = reverse_kl(dist.Poisson(torch.tensor([0.0, 1.0, 1.0])), dist.Bernoulli(probs), torch.zeros(3))
    assert torch.autograd.grad(value.sum(), probs)[0].isfinite().all()
