"""The intervals of noise on which a discrete draw has its value, and the joint law of two draws from one noise."""

import pyro.distributions as dist
import pytest
import torch

from pyro_kd.errors import UnsupportedGradientError
from pyro_kd.noise.samplers import sample_on
from pyro_kd.noise.steps import ends_of, log_coupling, neighbour_beyond, ties_of
from pyro_kd.noise.tape import NoiseTape

pytestmark = pytest.mark.usefixtures("float64")

FAMILIES = {
    "Bernoulli": (lambda a: dist.Bernoulli(a), 2),
    "Binomial": (lambda a: dist.Binomial(7, a), 8),
    "Geometric": (lambda a: dist.Geometric(a), 60),
    "Poisson": (lambda a: dist.Poisson(9 * a), 30),
}
families = pytest.mark.parametrize(("make", "size"), FAMILIES.values(), ids=FAMILIES)


@families
def test_the_intervals_have_the_masses_and_their_derivatives(make, size):
    a = torch.tensor(0.3, requires_grad=True)
    values = torch.arange(float(size))
    width, mass = ends_of(make(a), values).width, make(a).log_prob(values).exp()
    assert torch.allclose(width, mass, atol=1e-14)
    for one, other in zip(width, mass, strict=True):
        (slope,), (truth,) = (torch.autograd.grad(x, a, retain_graph=True) for x in (one, other))
        assert torch.isclose(slope, truth, atol=1e-12)


@families
def test_draws_come_from_their_intervals(make, size):
    tape = NoiseTape()
    value = sample_on(tape, make(torch.tensor(0.3)), torch.Size([10_000]))
    ends, u = ends_of(make(torch.tensor(0.3)), value), tape.draws[0].noise
    assert ((ends.low - 1e-12 < u) & (u < ends.high + 1e-12)).all()


@families
def test_beyond_an_end_is_the_neighbour(make, size):
    fn = make(torch.tensor(0.3))
    value = fn.sample((1000,))
    ends = ends_of(fn, value)
    for upper, has_neighbour, mine, its in ((True, ends.high < 1, "high", "low"), (False, ends.low > 0, "low", "high")):
        value_there = neighbour_beyond(fn, value, high=torch.full_like(value, upper, dtype=torch.bool))
        there = ends_of(fn, value_there[has_neighbour])
        assert torch.allclose(getattr(there, its), getattr(ends, mine)[has_neighbour], atol=1e-12)


@families
def test_the_joint_law_of_two_draws_adds_up_to_each_law(make, size):
    student, teacher = make(torch.tensor(0.3)), make(torch.tensor(0.45))
    values = torch.arange(float(size))
    mine, theirs = torch.meshgrid(values, values, indexing="xy")
    joint = log_coupling(student, mine, teacher, theirs).exp()
    assert torch.allclose(joint.sum(0), student.log_prob(values).exp(), atol=1e-6)
    assert torch.allclose(joint.sum(1), teacher.log_prob(values).exp(), atol=1e-6)


def test_a_bit_and_a_count_of_one_trial_run_in_opposite_directions():
    bit, count = dist.Bernoulli(torch.tensor(0.3)), dist.Binomial(1, torch.tensor(0.4))
    both = log_coupling(bit, torch.tensor(1.0), count, torch.tensor(0.0)).exp()
    assert torch.isclose(both, torch.tensor(0.3))  # u < 0.3 gives the bit 1, and u <= 0.6 the count 0


@pytest.mark.parametrize("student", [[0.1, 0.5, 0.25, 0.15], [0.0, 0.6, 0.25, 0.15], [0.3, 0.2, 0.1, 0.4]])
def test_the_joint_law_of_categories_is_that_of_a_race(student):
    q, p, number = torch.tensor(student), torch.tensor([0.3, 0.2, 0.1, 0.4]), 200_000
    m, k = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    joint = log_coupling(dist.Categorical(q), k, dist.Categorical(p), m).exp()
    assert torch.allclose(joint.sum(0), q, atol=1e-12)
    assert torch.allclose(joint.sum(1), p, atol=1e-12)
    times = torch.empty(number, 4).exponential_()
    counts = torch.zeros(4, 4).index_put_(
        ((p / times).argmax(-1), (q / times).argmax(-1)), torch.ones(number), accumulate=True
    )
    error = (counts / number - joint).abs()
    assert (error <= 5 * (joint * (1 - joint) / number).sqrt() + 1e-12).all()


def test_one_hot_categories_are_the_same():
    q, p = torch.tensor([0.1, 0.5, 0.4]), torch.tensor([0.3, 0.2, 0.5])
    one_hot = dist.OneHotCategorical(q), torch.eye(3)[1], dist.OneHotCategorical(p), torch.eye(3)[2]
    index = dist.Categorical(q), torch.tensor(1), dist.Categorical(p), torch.tensor(2)
    assert torch.equal(log_coupling(*one_hot), log_coupling(*index))
    assert torch.equal(log_coupling(*one_hot[:2], *index[2:]), log_coupling(*index))


def test_a_category_is_drawn_if_its_time_is_below_the_tie():
    fn, tape = dist.Categorical(torch.tensor([0.1, 0.5, 0.4])), NoiseTape()
    value = sample_on(tape, fn, torch.Size([1000]))
    times = tape.draws[0].noise.reshape(1000, 3)
    assert torch.equal((times < ties_of(fn, times)).long().argmax(-1), value)
    assert torch.equal((times < ties_of(fn, times)).sum(-1), torch.ones(1000))


def test_families_without_a_joint_law_are_named():
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    message = "the law of the student's draw given the teacher's, from Normal, is not known: a Normal is not drawn from one uniform number"
    with pytest.raises(UnsupportedGradientError, match=message):
        log_coupling(dist.Bernoulli(one / 2), one, dist.Normal(zero, one), zero)
    with pytest.raises(UnsupportedGradientError, match="the teacher has 3 categories, and the student 2"):
        log_coupling(dist.Categorical(torch.ones(2)), zero, dist.Categorical(torch.ones(3)), zero)
