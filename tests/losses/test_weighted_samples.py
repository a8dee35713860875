"""The batch as weighted samples: unbiased weights, a bound, and its gradient by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from models.helmholtz import HelmholtzMachine
from pyro_kd import MultiSampleKD, freeze
from pyro_kd.errors import PlateMismatchError
from pyro_kd.losses.row_exchange import Exchange
from pyro_kd.losses.weighted_samples import Blocks, log_weights, weighted_bound
from pyro_kd.metrics import marginal_kl
from pyro_kd.utils.estimate import Estimate
from tests.support.captured import MARKS, Pair
from tests.support.estimates import assert_within


class Machine(nn.Module):
    """x -> z -> w -> y, all of them bits, where x is an input."""

    def __init__(self, seed, z="z"):
        super().__init__()
        torch.manual_seed(seed)
        self.logits = nn.Parameter(1.5 * torch.randn(6, dtype=torch.float64))
        self.z = z

    def forward(self, x):
        logits = self.logits
        with pyro.plate("rows", len(x)):
            z = pyro.sample(self.z, dist.Bernoulli(logits=logits[x]))
            w = pyro.sample("w", dist.Bernoulli(logits=logits[2 + z.long()]))
            pyro.sample("y", dist.Bernoulli(logits=logits[4 + w.long()]))


def bits(rows):
    """Inputs of rows, in which all blocks have both bits."""
    return torch.arange(rows) % 2


def loss(num_samples, **options):
    return MultiSampleKD(["y"], num_samples=num_samples, reuse_batch="weighted", **options)


def estimate(loss, student, teacher, rows, repeats):
    values = [loss.loss(student, teacher, bits(rows)) / rows for _ in range(repeats)]
    return Estimate.of(torch.tensor(values, dtype=torch.float64))


def conditional(of_z, of_y):
    """z given an input x of its row, and y given z; all of them bits, with these probabilities of a 1."""
    of_z, of_y = torch.tensor(of_z, dtype=torch.float64), torch.tensor(of_y, dtype=torch.float64)

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(of_z[x]))
            pyro.sample("y", dist.Bernoulli(of_y[z.long()]))

    def exact(x, y):
        one = of_z[x] * of_y[1] + (1 - of_z[x]) * of_y[0]
        return torch.where(y > 0, one, 1 - one).log()

    return model, exact


def test_both_means_of_weights_are_honest_for_given_inputs():
    """The student's is unbiased. The teacher's contains a draw from the posterior, so that its inverse is unbiased."""
    (student, mine), (teacher, theirs) = conditional([0.3, 0.6], [0.7, 0.2]), conditional([0.05, 0.95], [0.4, 0.6])
    x, teacher = torch.tensor([0, 0, 1, 1]).repeat(300), freeze(teacher)
    weighted, blocks = MultiSampleKD(["y"], num_samples=3, reuse_batch="weighted"), Blocks(-1, len(x), 4)

    ratios = []
    for _ in range(40):
        (particle,) = weighted.particles(student, teacher, x)
        run, y = particle.run, particle.run.pairs[-1].value
        assert run.exchange == Exchange("", frozenset({"z"}), frozenset({"z"}))
        log_q, _, _ = log_weights(run, run.student, blocks, [-1], None, run.exchange.student, lambda pair: pair.q, {})
        log_q = log_q.masked_fill(blocks.is_own(log_q, -1), -math.inf).logsumexp(0)
        log_p = weighted_bound(run, blocks, [-1], None, run.exchange, "score", {}) + log_q
        logs = torch.stack([log_q - math.log(3) - mine(x, y), theirs(x, y) - log_p + math.log(3)])
        ratios.append(logs.exp().reshape(2, 300, 4))
    for each in torch.cat(ratios, 1).mean(-1):  # the mean of a block, of either program
        assert_within(Estimate.of(each), 1.0)


def test_it_falls_to_the_exact_kl_with_the_number_of_samples():
    student, teacher = Machine(1), freeze(Machine(0))
    exact = marginal_kl(student, teacher, ["y"], bits(50000))
    bounds = [estimate(loss(k), student, teacher, 500, 20) for k in (4, 24, 249)]
    for higher, lower in zip(bounds, [*bounds[1:], exact], strict=True):
        assert higher.mean - lower.mean > -4 * math.hypot(higher.standard_error, lower.standard_error)
    assert bounds[0].mean - exact.mean > 5 * bounds[0].standard_error
    assert abs(bounds[-1].mean - exact.mean) < 4 * math.hypot(bounds[-1].standard_error, exact.standard_error) + 1 / 249


@pytest.mark.parametrize("gradient", ["score", "cut"])
def test_its_gradient_is_that_of_the_formula(gradient):
    student, teacher = Machine(1), freeze(Machine(0))
    weighted = loss(3, gradient=gradient)
    (particle,) = weighted.particles(student, teacher, bits(8))
    pyro.set_rng_seed(7)
    weighted.combine([particle]).backward()
    found, student.logits.grad = student.logits.grad, None
    pyro.set_rng_seed(7)
    uniform = torch.rand(8, dtype=torch.float64)
    nodes, logits = particle.run.student.nodes, student.logits
    z, w, y = (nodes[name]["value"].detach() for name in ("z", "w", "y"))
    x, teachers_z = bits(8), particle.run.teacher.nodes["z"]["value"]
    teachers_logits = Machine(0).logits.detach()

    def log(index, value, of=logits):
        return nn.functional.logsigmoid(of[index] if value else -of[index])

    total = 0.0
    for r in range(8):
        others = [s for s in range(r // 4 * 4, r // 4 * 4 + 4) if s != r]
        chances = torch.stack([log(x[s], teachers_z[r], teachers_logits) for s in others]).exp()
        chosen = int((chances.cumsum(0) / chances.sum() < uniform[r]).sum())
        samples = [r if k == chosen else s for k, s in enumerate(others)]
        likelihood = torch.stack([log(4 + w[s].long(), y[r]) for s in samples])
        of_row = torch.stack([log(x[r], z[s]) for s in samples])
        mean = torch.stack([torch.stack([log(x[t], z[s]) for t in others]).logsumexp(0) for s in samples])
        by_latents = torch.stack([log(2 + z[s].long(), w[s]) for s in samples])
        share = (likelihood + of_row - mean).softmax(0).detach()
        total = total - (share * likelihood).sum()
        if gradient == "score":
            total = total - (share * (of_row + by_latents)).sum() + log(x[r], z[r]) + log(2 + z[r].long(), w[r])
    total.backward()
    torch.testing.assert_close(found, student.logits.grad)


@pytest.mark.parametrize("size", [3, 5])
def test_the_gradient_vanishes_where_student_and_teacher_are_equal(size):
    student, teacher = Machine(0), freeze(Machine(0))
    module, found = loss(size - 1)(student, teacher), []
    for _ in range(60):
        student.zero_grad()
        (module(bits(201 * size)) / (201 * size)).backward()
        found.append(student.logits.grad.clone())
    for column in torch.stack(found).unbind(1):
        assert_within(Estimate.of(column), 0.0)


def test_it_trains_a_student_to_the_exact_kl():
    student, teacher = Machine(1), freeze(Machine(0))
    module = loss(15)(student, teacher)
    optimiser = torch.optim.Adam(student.parameters(), lr=0.05)
    before = marginal_kl(student, teacher, ["y"], bits(5000)).mean
    for _ in range(120):
        (module(bits(64)) / 64).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert marginal_kl(student, teacher, ["y"], bits(5000)).mean < 0.05 * before


def test_names_may_differ():
    student, teacher = Machine(1, "v"), freeze(Machine(0))
    options = {"site_map": {"v": "z"}}
    same = estimate(loss(9), Machine(1), teacher, 400, 20)
    other = estimate(loss(9, **options), student, teacher, 400, 20)
    assert abs(same.mean - other.mean) < 5 * math.hypot(same.standard_error, other.standard_error)


@MARKS[0]
def test_captured_it_equals_the_eager_loss():
    for options in ({}, {"chunk_size": 2}, {"num_particles": 2}):
        pair = Pair(Machine(1), freeze(Machine(0)), loss(3, **options))
        for _ in range(2):
            pair.agree(bits(20))
        assert pair.captured.loss._pairs._pairs[0].captured._capture.num_graphs == 1


def test_where_weights_do_not_apply_is_an_error_that_names_the_runs():
    def program(shift, law=dist.Normal, both=False):
        with pyro.plate("rows", 6):
            z = pyro.sample("z", law(torch.tensor(0.5), torch.tensor(0.5)) if law is dist.Normal else law(torch.tensor(0.5)))
            y = pyro.sample("y", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(y + z + shift if both else y, 1.0))

    weighted = MultiSampleKD(["y", "x"], num_samples=3, reuse_batch="weighted")
    with pytest.raises(PlateMismatchError, match="does not apply: the latents 'z' have a derivative.*reuse_batch=False"):
        weighted.loss(lambda: program(0.5), freeze(lambda: program(0.0)))
    with pytest.raises(PlateMismatchError, match="does not apply: both the latents of a row and its targets.*of 'x'"):
        weighted.loss(lambda: program(0.5, dist.Bernoulli, True), freeze(lambda: program(0.0, dist.Bernoulli, True)))


def test_latents_that_depend_on_targets_have_no_weights():
    """Given the targets of their row, the latents before these do not follow their prior."""
    student, teacher = HelmholtzMachine(2), freeze(HelmholtzMachine(4).model)
    weighted = MultiSampleKD(["y2", "y1"], num_samples=4, reuse_batch="weighted")
    with pytest.raises(
        PlateMismatchError, match="does not apply: targets of a row decide on the distribution of latent 'z2'"
    ):
        weighted.loss(student.model, teacher, 10)


def test_wrong_options_are_errors():
    with pytest.raises(ValueError, match="reuse_batch must be None, True, False or 'weighted', not 'always'"):
        MultiSampleKD(["y"], reuse_batch="always")
    with pytest.raises(ValueError, match="has the gradients 'score' and 'cut', not 'leave_one_out'"):
        loss(5, gradient="leave_one_out")
    with pytest.raises(
        ValueError, match="num_samples=8 with reuse_batch='weighted' needs a batch of at least 9 rows, not 8"
    ):
        loss(8).loss(Machine(1), freeze(Machine(0)), bits(8))
