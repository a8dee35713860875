"""The gradients of the K-sample bound, against enumeration and finite differences."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import MultiSampleKD, freeze
from pyro_kd.utils.estimate import Estimate
from tests.support.estimates import assert_within
from tests.support.sampled_coins import WAYS, Coin, leave_one_out_objective, score_gradient

STUDENT, TEACHER = (0.4, (-1.0, 1.5)), (-0.6, (2.0, -1.0))


def gradients(loss, student, teacher, rows=1500, repeats=40):
    """The mean gradient a row, as estimates with standard errors: of the prior's logit and of both logits of y."""
    module, found = loss(student, freeze(teacher)), []
    for _ in range(repeats):
        student.zero_grad()
        (module(rows) / rows).backward()
        found.append(
            torch.cat([torch.zeros(1) if student.prior.grad is None else student.prior.grad[None], student.logits.grad])
        )
    return [Estimate.of(column) for column in torch.stack(found).unbind(1)]


def assert_gradient(estimates, truth):
    prior, logits = truth
    for estimate, value in zip(estimates, [prior, *logits], strict=True):
        assert_within(estimate, float(value))


@pytest.mark.parametrize("way", ["batch", "plate"])
@pytest.mark.parametrize("num_samples", [3, 5])
def test_the_leave_one_out_gradient_is_that_of_the_bound_without_the_first_sample(way, num_samples):
    student, teacher = Coin(*STUDENT), Coin(*TEACHER)
    loss = MultiSampleKD(["y"], num_samples=num_samples, gradient="leave_one_out", **WAYS[way])
    truth = torch.autograd.grad(leave_one_out_objective(student, teacher, num_samples), [student.prior, student.logits])
    assert_gradient(gradients(loss, student, teacher), truth)


@pytest.mark.parametrize(("way", "rows", "repeats"), [("batch", 1500, 40), ("plate", 1500, 40), ("loop", 800, 25)])
@pytest.mark.parametrize("num_samples", [2, 4])
def test_the_score_gradient_has_the_enumerated_mean(way, rows, repeats, num_samples):
    student, teacher = Coin(*STUDENT), Coin(*TEACHER)
    loss = MultiSampleKD(["y"], num_samples=num_samples, **WAYS[way])
    assert_gradient(gradients(loss, student, teacher, rows, repeats), score_gradient(student, teacher, num_samples))


def exact_gradient(student, teacher):
    """Of the KL of the marginals."""
    p, q = ((each.log_prior()[:, None] + each.log_probs()).logsumexp(0) for each in (teacher, student))
    return torch.autograd.grad((p.exp().detach() * (p.detach() - q)).sum(), [student.prior, student.logits])


def test_the_bias_of_the_score_gradient_falls_as_one_over_the_number_of_samples():
    student, teacher = Coin(*STUDENT), Coin(*TEACHER)
    exact = torch.cat([gradient.reshape(-1) for gradient in exact_gradient(student, teacher)])
    found = [torch.cat([g.reshape(-1) for g in score_gradient(student, teacher, k)]) for k in (2, 4, 8)]
    errors = [float((gradient - exact).norm()) for gradient in found]
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]


@pytest.mark.parametrize("num_samples", [2, 5])
def test_the_score_gradient_vanishes_where_student_and_teacher_are_equal(num_samples):
    for gradient in score_gradient(Coin(*TEACHER), Coin(*TEACHER), num_samples):
        assert gradient.abs().max() < 1e-12


def test_a_cut_gradient_leaves_the_bit_alone():
    student = Coin(*STUDENT)
    loss = MultiSampleKD(["y"], num_samples=4, gradient="cut")(student, freeze(Coin(*TEACHER)))
    loss(100).backward()
    assert student.prior.grad is None
    assert student.logits.grad.abs().min() > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gradient", ["score", "leave_one_out"])
def test_the_gradient_through_continuous_latents_is_the_derivative_on_fixed_noise(way, gradient):
    def program(loc, slope):
        with pyro.plate("rows", 6):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            w = pyro.sample("w", dist.Normal(slope * z, 0.5))
            pyro.sample("y", dist.Normal(w.sin() + z, 0.7))

    teacher = freeze(lambda: program(torch.tensor(0.3).double(), torch.tensor(-1.0).double()))
    loss = MultiSampleKD(["y"], num_samples=4, gradient=gradient, **WAYS[way])
    values = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.1, 0.8)]
    current = list(values)

    def student():
        return program(*current)

    def value(*parameters):
        current[:] = parameters
        pyro.set_rng_seed(5)
        return loss.differentiable_loss(student, teacher)

    assert torch.autograd.gradcheck(value, values)


def test_a_bit_behind_a_continuous_latent_trains_both():
    """The score of a discrete latent reaches the continuous parent of its probability."""

    def program(loc):
        with pyro.plate("rows", 4000):
            z = pyro.sample("z", dist.Normal(loc, 0.1))
            bit = pyro.sample("bit", dist.Bernoulli(logits=4 * z))
            pyro.sample("y", dist.Normal(2 * bit, 0.5))

    loc = torch.tensor(-0.2, requires_grad=True)
    loss = MultiSampleKD(["y"], num_samples=32)
    loss.loss_and_grads(lambda: program(loc), freeze(lambda: program(torch.tensor(0.3))))
    assert loc.grad < 0
