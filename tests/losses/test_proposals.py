"""The K-sample bound whose student's latents come from a proposal: exact with the posterior, unbiased with any other."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_kd import Distiller, MultiSampleKD, freeze
from pyro_kd.errors import UnpairedSiteError
from pyro_kd.metrics import marginal_kl, marginal_log_prob
from pyro_kd.utils.estimate import Estimate
from tests.support.captured import MARKS, Pair
from tests.support.estimates import assert_within
from tests.support.sampled_coins import Coin

STUDENT, TEACHER = (0.4, (-1.0, 1.5)), (-0.6, (2.0, -1.0))


class Encoder(nn.Module):
    """z given y: a bit."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits, dtype=torch.float64))

    def forward(self, values, rows):
        with pyro.plate("rows", rows):
            pyro.sample("z", dist.Bernoulli(logits=self.logits[values["y"].long()]))


def posterior(coin):
    """The encoder that is exact for a coin."""
    joint = coin.log_prior()[:, None] + coin.log_probs()
    return Encoder((joint[1] - joint[0]).detach())


def test_with_the_posterior_the_value_is_exact_and_all_draws_count_alike():
    student, teacher = Coin(*STUDENT), freeze(Coin(*TEACHER))
    loss = MultiSampleKD(["y"], num_samples=3, proposal=posterior(student))
    (particle,) = loss.particles(student, teacher, 200)
    loss.combine([particle]).backward()
    run = particle.run
    y, z = run.teacher.nodes["y"]["value"][0], run.student.nodes["z"]["value"].long()
    log_p = dist.Bernoulli(logits=run.teacher.nodes["y"]["fn"].logits).log_prob(y).logsumexp(0) - math.log(3)
    exact = marginal_log_prob(student, {"y": y}, 200).sum()
    assert loss.combine([particle]).item() == pytest.approx((log_p.sum() - exact).item())
    joint = student.log_prior()[z] + student.log_probs()[z, y.long()]
    truth = torch.autograd.grad(-joint.mean(0).sum(), [student.prior, student.logits])
    torch.testing.assert_close([student.prior.grad, student.logits.grad], list(truth))


def objective(student, teacher, encoder, num_samples):
    """The student's part of the bound by enumeration, differentiable in the student and the encoder."""
    bits = torch.tensor(list(itertools.product(range(2), repeat=num_samples)))
    y = (teacher.log_prior().exp()[:, None] * teacher.log_probs().exp()).sum(0).detach()
    total = 0.0
    for value in (0, 1):
        log_q = torch.stack([nn.functional.logsigmoid(sign * encoder.logits[value]) for sign in (-1, 1)])
        log_w = student.log_prior() + student.log_probs()[:, value] - log_q
        total = total - y[value] * (log_q[bits].sum(1).exp() * (log_w[bits].logsumexp(1) - math.log(num_samples))).sum()
    return total


@pytest.mark.parametrize("gradient", ["leave_one_out", "score"])
def test_gradients_are_unbiased_for_any_proposal(gradient):
    student, teacher, encoder = Coin(*STUDENT), Coin(*TEACHER), Encoder([0.5, -0.3])
    params = [student.prior, student.logits, encoder.logits]
    truth = torch.cat([g.reshape(-1) for g in torch.autograd.grad(objective(student, teacher, encoder, 3), params)])
    module = MultiSampleKD(["y"], num_samples=3, gradient=gradient, proposal=encoder)(student, freeze(teacher))
    found = []
    for _ in range(40):
        for param in params:
            param.grad = None
        (module(1500) / 1500).backward()
        found.append(torch.cat([param.grad.reshape(-1) for param in params]))
    trained = 3 if gradient == "score" else 5  # posterior-weighted scores train the encoder by another objective
    for estimate, value in list(zip(torch.stack(found).unbind(1), truth, strict=True))[:trained]:
        assert_within(Estimate.of(estimate), float(value))


def test_a_continuous_proposal_is_trained_by_its_derivative():
    def program(loc):
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5))

    current = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.3, 0.6, -0.2)]
    inputs = list(current)

    def encoder(values):
        with pyro.plate("rows", 5):
            pyro.sample("z", dist.Normal(current[1] * values["y"], current[2].exp()))

    loss = MultiSampleKD(["y"], num_samples=4, proposal=encoder)
    teacher = freeze(lambda: program(torch.tensor(0.0, dtype=torch.float64)))

    def value(*parameters):
        current[:] = parameters
        pyro.set_rng_seed(3)
        return loss.differentiable_loss(lambda: program(current[0]), teacher)

    assert torch.autograd.gradcheck(value, inputs)


def test_svi_trains_student_and_proposal():
    teacher = freeze(Coin(0.0, (-2.0, 1.0)))

    def student(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("prior", torch.tensor(0.2))))
            pyro.sample("y", dist.Bernoulli(logits=pyro.param("logits", torch.tensor([0.5, 0.1]))[z.long()]))

    def proposal(values, rows):
        with pyro.plate("rows", rows):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("encoder", torch.zeros(2))[values["y"].long()]))

    svi = SVI(student, teacher, pyro.optim.Adam({"lr": 0.05}), loss=MultiSampleKD(["y"], num_samples=4, proposal=proposal))
    svi.step(64)  # makes the parameters
    before = marginal_kl(student, teacher, ["y"], 2000).mean
    for _ in range(80):
        svi.step(64)
    assert marginal_kl(student, teacher, ["y"], 2000).mean < 0.2 * before
    assert pyro.param("encoder").detach().abs().max() > 0.1


@MARKS[0]
def test_captured_it_equals_the_eager_loss():
    for gradient in ("score", "leave_one_out"):
        loss = MultiSampleKD(["y"], num_samples=3, gradient=gradient, proposal=Encoder([0.5, -0.3]))
        pair = Pair(Coin(*STUDENT), freeze(Coin(*TEACHER)), loss)
        for _ in range(2):
            pair.agree(20)
        assert pair.captured.loss._pairs._pairs[0].captured._capture.num_graphs == 1


def test_distiller_trains_an_encoder_that_is_part_of_the_student():
    student = Coin(0.0, (0.5, -0.3))
    student.encoder = Encoder([0.0, 0.0])
    loss = MultiSampleKD(["y"], num_samples=4, proposal=student.encoder)
    teacher = freeze(Coin(0.0, (-2.0, 1.0)))
    before = marginal_kl(student, teacher, ["y"], 2000).mean
    Distiller(student, teacher, lambda params: torch.optim.Adam(params, lr=0.05), loss).fit(64, steps=80, progress=False)
    assert marginal_kl(student, teacher, ["y"], 2000).mean < 0.2 * before
    assert student.encoder.logits.detach().abs().max() > 0.1


def test_a_proposal_draws_exactly_the_latents():
    def other(values, rows):
        with pyro.plate("rows", rows):
            pyro.sample("w", dist.Bernoulli(torch.tensor(0.5)))

    with pytest.raises(
        UnpairedSiteError, match="the proposal must draw the latents of the student.*lacks 'z', and has 'w' besides"
    ):
        MultiSampleKD(["y"], num_samples=3, proposal=other).loss(Coin(*STUDENT), freeze(Coin(*TEACHER)), 10)


@pytest.mark.parametrize(
    "options",
    [{"reuse_batch": True}, {"vectorize": False}, {"num_samples": 1}, {"latent_weight": 0.5}],
)
def test_options_that_a_proposal_has_no_part_for_are_errors(options):
    with pytest.raises(ValueError, match="a proposal draws the student's latents for the targets of each row"):
        MultiSampleKD(["y"], proposal=Encoder([0.0, 0.0]), **options)
