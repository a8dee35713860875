"""Mixtures of teachers, against exact mixtures of categories."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_kd import Distiller, MultiSampleKD, OnPolicyKD, freeze, mixture_of
from pyro_kd.errors import InvalidProgramError
from pyro_kd.metrics import marginal_kl, marginal_log_prob
from tests.support.gradient_estimates import assert_mean, gradients
from tests.support.losses import SurrogateKD
from tests.support.second_device import SECOND, two_devices

PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.2, 0.6]])
WEIGHTS = [3.0, 1.0, 1.0]
MIXTURE = (torch.tensor(WEIGHTS)[:, None] / 5 * PROBS).sum(0)
KINDS = {"one teacher": {}, "one for all rows": {"sites": ["y"]}, "one a row": {"sites": ["y"], "rows": int}}


def categories(probs):
    def program(rows):
        with pyro.plate("data", rows):
            pyro.sample("y", dist.Categorical(probs))

    return program


TEACHERS = [categories(probs) for probs in PROBS]


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.5))

    @property
    def logits(self):
        return torch.stack([self.first, self.second, torch.zeros(())])

    def forward(self, rows):
        with pyro.plate("data", rows):
            pyro.sample("y", dist.Categorical(logits=self.logits))


def exact_kl(student):
    return (MIXTURE * (MIXTURE.log() - student.logits.log_softmax(0))).sum()


@pytest.mark.filterwarnings("ignore:the rows of")
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_kl_to_the_mixture(kind):
    pyro.set_rng_seed(0)
    student = Student()
    params = list(student.parameters())
    loss = SurrogateKD(["y"], fresh=["teacher"])(student, mixture_of(TEACHERS, weights=WEIGHTS, **KINDS[kind]))
    truth = torch.stack(torch.autograd.grad(8 * exact_kl(student), params))
    assert_mean(gradients(loss, params, 150, 8), truth)


@pytest.mark.filterwarnings("ignore:the rows of")
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_kl_to_the_mixture_and_the_information_about_the_teacher(kind):
    pyro.set_rng_seed(1)
    student = Student()
    loss = SurrogateKD(["y"], fresh=["teacher"])(student, mixture_of(TEACHERS, weights=WEIGHTS, **KINDS[kind]))
    information = (torch.tensor(WEIGHTS)[:, None] / 5 * PROBS * (PROBS / MIXTURE).log()).sum()
    with torch.no_grad():
        found = torch.stack([loss(8) / 8 for _ in range(150)])
        assert_mean(found, exact_kl(student) + information)


def test_the_law_of_a_row_can_be_enumerated():
    """With the number of the teacher summed out, the metrics compute the exact KL to the mixture."""
    pyro.set_rng_seed(2)
    student, teacher = Student(), mixture_of(TEACHERS, weights=WEIGHTS, sites=["y"], rows=int)
    log_prob = marginal_log_prob(teacher, {"y": torch.arange(3)}, 3)
    torch.testing.assert_close(log_prob.exp(), MIXTURE)
    found = marginal_kl(student, teacher, ["y"], 5000)
    assert abs(found.mean - exact_kl(student)) < 5 * found.standard_error


def test_a_student_with_the_number_of_the_teacher_learns_each_of_them():
    table = nn.Parameter(torch.zeros(3, 3))

    def student(rows):
        with pyro.plate("numbers", rows):
            number = pyro.sample("teacher", dist.Categorical(torch.tensor(WEIGHTS)))
            pyro.sample("y", dist.Categorical(logits=table[number]))

    loss = SurrogateKD(["y"])(student, mixture_of(TEACHERS, weights=WEIGHTS, sites=["y"], rows=int))
    optim = torch.optim.Adam([table], lr=0.2)
    for _ in range(80):
        optim.zero_grad()
        loss(64).backward()
        optim.step()
    torch.testing.assert_close(table.softmax(-1), PROBS, atol=1e-2, rtol=0)


def test_without_sites_the_latents_of_the_teachers_keep_their_names_and_noise():
    def program(loc):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + loc, 1.0))

    def student():
        number = pyro.sample("teacher", dist.Categorical(torch.ones(2)))
        program(2.0 * number)

    teacher = mixture_of([lambda: program(0.0), lambda: program(2.0)])
    terms = [SurrogateKD(["y"]).terms(student, teacher) for _ in range(20)]
    assert all(list(found) == ["teacher", "z", "y"] for found in terms)
    assert all(found["y"].value < 1e-12 for found in terms)


def test_values_of_a_row_belong_to_one_teacher():
    """Later sites depend on earlier ones, so the values must be of one run of one teacher."""

    def program(sign):
        def run(rows):
            with pyro.plate("data", rows):
                first = pyro.sample("first", dist.Normal(10.0 * sign, 1.0))
                pyro.sample("second", dist.Normal(first, 0.001))

        return run

    nodes = poutine.trace(mixture_of([program(-1), program(1)], sites=["first", "second"], rows=int)).get_trace(200).nodes
    first, second, number = (nodes[name]["value"] for name in ("first", "second", "teacher"))
    torch.testing.assert_close(first, second, atol=0.01, rtol=0)
    assert ((first > 0) == (number == 1)).all()
    torch.testing.assert_close(nodes["second"]["fn"].mean, first)


@pytest.mark.filterwarnings("ignore:the rows of")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_in_a_distiller(kind):
    pyro.set_rng_seed(3)
    student, loss = Student(), SurrogateKD(["y"], fresh=["teacher"])
    teacher = mixture_of(TEACHERS, weights=WEIGHTS, **KINDS[kind])
    distiller = Distiller(student, teacher, lambda params: torch.optim.Adam(params, lr=0.1), loss.compile(backend=None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distiller.fit(256, steps=100, progress=False)
    assert any("without a graph" in str(w.message) for w in caught) is (kind == "one teacher")
    assert (student.logits.softmax(0) - MIXTURE).abs().max() < 0.15


def test_vectorized_particles_need_the_sites():
    loss = SurrogateKD(["y"], fresh=["teacher"], num_particles=4, vectorize_particles=True)
    with pytest.raises(InvalidProgramError, match=r"several particles at once.*sites=\['y'\]"):
        loss.loss(Student(), mixture_of(TEACHERS), 8)
    assert loss.loss(Student(), mixture_of(TEACHERS, sites=["y"], rows=int), 8) > 0


def test_teachers_that_are_frozen_are_kept():
    frozen = freeze(TEACHERS[0])
    assert mixture_of([frozen]).program.teachers[0] is frozen


def masked(rows):
    with pyro.plate("data", rows), poutine.mask(mask=torch.tensor(False)):
        pyro.sample("y", dist.Categorical(PROBS[0]))


def wide(rows):
    with pyro.plate("data", rows):
        pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1))


ERRORS = {
    "no teachers": (lambda: mixture_of([]), "at least one teacher"),
    "too few weights": (lambda: mixture_of(TEACHERS, weights=[1.0]), "must be 3 numbers.*but are"),
    "a negative weight": (lambda: mixture_of(TEACHERS, weights=[1.0, -1.0, 1.0]), "none below 0"),
    "weights of 0": (lambda: mixture_of(TEACHERS, weights=[0.0, 0.0, 0.0]), "not all 0"),
    "rows without sites": (lambda: mixture_of(TEACHERS, rows=int), r"names of the targets.*sites=\['y'\], rows=len"),
    "a site that is missing": (
        lambda: mixture_of(TEACHERS, sites=["z"])(3),
        "'z' is not a site of the teacher.*which has 'data', 'y'",
    ),
    "shapes that differ": (lambda: mixture_of([TEACHERS[0], wide], sites=["y"])(3), "site 'y' has different shapes"),
    "a mask": (lambda: mixture_of([masked], sites=["y"])(3), "site 'y' of the teacher.*is masked, scaled or subsampled"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    make, text = ERRORS[case]
    with pytest.raises(InvalidProgramError, match=text):
        make()


def test_the_teachers_move_with_the_mixture():
    def program(rows):
        with pyro.plate("rows", rows):
            pyro.sample("y", dist.Normal(loc, 1.0))

    loc = torch.zeros(1)
    mixture = mixture_of([program, program], sites=["y"])
    with two_devices():
        mixture.to(SECOND)
        assert {tensor.device for tensor in mixture.tensors()} == {SECOND}
    assert len(mixture.tensors()) == 3  # the weights, and one of each teacher


def chain(loc):
    def program(rows):
        with pyro.plate("rows", rows):
            first = pyro.sample("y1", dist.Normal(loc, 1.0))
            pyro.sample("y2", dist.Normal(loc * first, 0.5))

    return program


def other_chain(rows):
    with pyro.plate("rows", rows):
        first = pyro.sample("y1", dist.Normal(0.5, 1.0))
        pyro.sample("y2", dist.Normal(0.5 * first, 1.0))


@pytest.mark.filterwarnings("ignore:the rows of")
@pytest.mark.parametrize("rows", [int, None])
def test_later_sites_of_a_mixture_depend_on_the_values_that_a_loss_gives(rows):
    """On-policy: the first site is the student's, so that the loss is a mean of closed forms over the teachers."""
    number = 4000
    mixture = mixture_of([chain(-1.0), chain(2.0)], sites=["y1", "y2"], rows=rows)
    loss = OnPolicyKD(["y1", "y2"], fresh=["teacher"])
    pyro.set_rng_seed(0)
    runs = 4 if rows else 60
    found = sum(loss.loss(other_chain, mixture, number) for _ in range(runs)) / runs / number
    second_moment = 1.0 + 0.5**2
    expected = sum(
        (loc - 0.5) ** 2 / 2 + torch.tensor(2.0).log().item() + (0.25 + (loc - 0.5) ** 2 * second_moment) / 2 - 0.5
        for loc in (-1.0, 2.0)
    )
    assert found == pytest.approx(expected / 2, abs=0.03)


def test_samples_of_a_mixture_bound_its_kl_in_a_loop_and_in_a_plate():
    """The exact bound of two samples, by its own draws."""
    pyro.set_rng_seed(0)
    number = 40_000
    teacher = torch.tensor([-1.0, 2.0])[torch.randint(2, (2, number))]
    y1 = dist.Normal(teacher[0], 1.0).sample()
    y2 = dist.Normal(teacher[0] * y1, 0.5).sample()
    log_p = dist.Normal(teacher, 1.0).log_prob(y1) + dist.Normal(teacher * y1, 0.5).log_prob(y2)
    log_q = dist.Normal(0.5, 1.0).log_prob(y1) + dist.Normal(0.5 * y1, 1.0).log_prob(y2)
    expected = (log_p.logsumexp(0) - torch.tensor(2.0).log() - log_q).mean().item()
    mixture = mixture_of([chain(-1.0), chain(2.0)], sites=["y1", "y2"], rows=int)
    for vectorize in (True, False):
        loss = MultiSampleKD(["y1", "y2"], num_samples=2, fresh=["teacher"], vectorize=vectorize)
        assert loss.loss(other_chain, mixture, number) / number == pytest.approx(expected, abs=0.08)  # it was 0.25 below


def test_sites_of_a_mixture_that_are_given_follow_the_order_of_the_teachers():
    mixture = mixture_of([chain(-1.0), chain(2.0)], sites=["y2", "y1"], rows=int)
    with pytest.raises(InvalidProgramError, match="in the order 'y1', 'y2': name them in the order of the teachers"):
        OnPolicyKD(["y1", "y2"], fresh=["teacher"]).loss(other_chain, mixture, 8)


def alone(law):
    def program(rows):
        with pyro.plate("rows", rows):
            pyro.sample("y", law)

    return program


@pytest.mark.parametrize(
    "laws",
    [
        (dist.Uniform(0.0, 1.0), dist.Uniform(1.0, 2.0)),
        (dist.Gamma(2.0, 1.0), dist.Normal(0.0, 1.0)),
        (dist.Poisson(2.0), dist.Binomial(3, 0.5)),
        (dist.Beta(2.0, 2.0), dist.LogNormal(0.0, 1.0)),
    ],
)
def test_a_mixture_of_sites_of_different_supports_has_its_density(laws):
    mixture = mixture_of([alone(law) for law in laws], sites=["y"], rows=int)
    drawn = torch.cat([law.sample((20,)) for law in laws])
    densities = torch.stack([outside(law, drawn) for law in laws])
    expected = (densities.logsumexp(0) - torch.tensor(2.0).log()).sum()
    found = marginal_log_prob(mixture, {"y": drawn}, len(drawn)).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def outside(law, values):
    inside = law.support.check(values)
    return torch.where(inside, law.log_prob(torch.where(inside, values, law.sample())), -torch.inf)


@pytest.mark.parametrize(
    "laws",
    [(dist.Poisson(2.0), dist.Binomial(3, 0.5)), (dist.Gamma(2.0, 1.0), dist.Normal(0.0, 1.0))],
    ids=["counts", "numbers"],
)
def test_a_mixture_of_different_families_is_captured(laws):
    def student(rows):
        with pyro.plate("rows", rows):
            law = dist.Poisson(pyro.param("rate", torch.tensor(1.0))) if laws[0].support.is_discrete else None
            pyro.sample("y", law or dist.Normal(pyro.param("loc", torch.tensor(0.5)), 2.0))

    mixture = mixture_of([alone(law) for law in laws], sites=["y"], rows=int)
    found = []
    for compiled in (False, True):
        loss = SurrogateKD(["y"], fresh=["teacher"])
        loss = loss.compile(backend=None) if compiled else loss
        pyro.set_rng_seed(0)
        found.append([loss.loss_and_grads(student, mixture, 16) for _ in range(3)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
