"""Distillation on histories that the student has drawn, which the teacher scores."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_kd import Distiller, LocalKD, OnPolicyKD, check, freeze, site_report, to_inference_data
from pyro_kd.training import DistillationObjective, linear
from tests.support.losses import SurrogateKD

ROWS = 5000
TARGETS = ["y_0", "y_1", "y_2"]


class Walk(nn.Module):
    """y_0 ~ N(0, 1), y_j ~ N(slope y_{j-1}, 1)."""

    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, rows=ROWS):
        y = torch.zeros(rows)
        with pyro.plate("rows", rows):
            for step in range(3):
                y = pyro.sample(f"y_{step}", dist.Normal(self.slope * y, 1.0))


def per_row(loss, student, teacher, count=30):
    values = torch.tensor([loss.loss(student, teacher, ROWS) / ROWS for _ in range(count)])
    return values.mean(), values.std() / count**0.5


def expected(student, teacher, fraction):
    """Sum of (difference of slopes)^2 E[history^2] / 2: the history is the student's draw or the teacher's, tossed at each step."""
    difference = (student - teacher) ** 2 / 2
    teachers = [1.0, 1.0 + teacher**2]  # second moments of the teacher's own y_0, y_1
    first = 1.0
    second = fraction * (1.0 + student**2 * first) + (1 - fraction) * teachers[1]
    return difference * (first + second)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_the_terms_are_taken_on_the_mixture_of_histories(fraction):
    student, teacher = Walk(1.5), freeze(Walk(0.5))
    mean, error = per_row(OnPolicyKD(TARGETS, student_fraction=fraction), student, teacher)
    assert abs(mean - expected(1.5, 0.5, fraction)) < 4 * error
    assert error < 0.05 * abs(expected(1.5, 0.5, 1.0) - expected(1.5, 0.5, 0.0))


def test_without_the_students_history_it_is_the_surrogate_loss():
    student, teacher = Walk(1.5), freeze(Walk(0.5))
    values = []
    for loss in (OnPolicyKD(TARGETS, student_fraction=0.0), SurrogateKD(TARGETS)):
        pyro.set_rng_seed(1)
        values.append(loss.loss(student, teacher, 100))
    assert values[0] == values[1]


def test_no_gradient_passes_through_the_history():
    student, teacher = Walk(1.5), freeze(Walk(0.5))
    loss = OnPolicyKD(TARGETS)
    (particle,) = loss.particles(student, teacher, ROWS)
    history = sum(particle.run.teacher.nodes[name]["value"].square().sum() for name in TARGETS[:2])
    sum(term.value for term in particle.terms).backward()
    assert student.slope.grad.item() == pytest.approx(((1.5 - 0.5) * history).item(), rel=1e-4)


def test_both_programs_have_the_same_history_and_the_same_noise():
    def program(weight):
        def model(rows=100):
            y = torch.zeros(rows)
            with pyro.plate("rows", rows):
                for step in range(2):
                    z = pyro.sample(f"z_{step}", dist.Normal(weight * y, 1.0))
                    y = pyro.sample(f"y_{step}", dist.Normal(z, 1.0))

        return model

    (particle,) = OnPolicyKD(["y_0", "y_1"], student_fraction=0.5).particles(program(2.0), program(1.0))
    z_0, y_0, z_1, y_1 = particle.run.pairs
    assert_close(z_0.student_value, z_0.value)
    assert_close(y_0.student_value, y_0.value)
    assert_close(z_1.student_value - 2.0 * y_0.value, z_1.value - y_0.value)
    assert_close(z_1.p.mean, y_0.value)
    assert_close(y_1.q.mean, z_1.student_value)


def test_an_estimate_takes_a_draw_of_the_teacher_and_not_the_students():
    """The history is no draw of the teacher's distribution, at which a Monte Carlo KL has to be evaluated."""

    def program(loc, family):
        def model(rows=ROWS):
            with pyro.plate("rows", rows):
                y = pyro.sample("y_0", dist.Normal(loc, 1.0))
                pyro.sample("y_1", family(0.1 * y, 1.0))

        return model

    student, teacher = program(1.0, dist.Normal), program(0.0, dist.Laplace)
    mean, error = per_row(OnPolicyKD(["y_0", "y_1"]), student, teacher)
    points = torch.linspace(-40.0, 40.0, 400_001)
    p, q = dist.Laplace(0.0, 1.0), dist.Normal(0.0, 1.0)
    exact = torch.trapezoid(p.log_prob(points).exp() * (p.log_prob(points) - q.log_prob(points)), points)
    assert abs(mean - (0.5 + exact)) < 4 * error


def test_a_category_of_the_student_reaches_the_teacher_in_its_coding():
    def student(rows=300):
        with pyro.plate("rows", rows):
            y = pyro.sample("y_0", dist.Categorical(torch.tensor([0.1, 0.1, 0.8])))
            pyro.sample("y_1", dist.Normal(y.float(), 1.0))

    def teacher(rows=300):
        with pyro.plate("rows", rows):
            y = pyro.sample("y_0", dist.OneHotCategorical(torch.tensor([0.8, 0.1, 0.1])))
            pyro.sample("y_1", dist.Normal(y.argmax(-1).float(), 1.0))

    (particle,) = OnPolicyKD(["y_0", "y_1"]).particles(student, teacher)
    y_0, y_1 = particle.run.pairs
    assert y_0.value.shape == (300, 3)
    assert (y_0.value.argmax(-1) == 2).float().mean() > 0.6
    assert_close(y_1.p.mean, y_0.value.argmax(-1).float())
    assert_close(y_1.q.mean, y_1.p.mean)


def test_a_student_in_train_mode_draws_its_history_in_evaluation_mode():
    class Normed(Walk):
        def __init__(self):
            super().__init__(1.0)
            self.norm = nn.BatchNorm1d(1)

        def forward(self, rows=ROWS):
            with pyro.plate("rows", rows):
                y = pyro.sample("y_0", dist.Normal(torch.zeros(rows), 1.0))
                pyro.sample("y_1", dist.Normal(self.slope * self.norm(y.unsqueeze(-1)).squeeze(-1), 1.0))

    def teacher(rows=ROWS):
        with pyro.plate("rows", rows):
            y = pyro.sample("y_0", dist.Normal(torch.zeros(rows), 1.0))
            pyro.sample("y_1", dist.Normal(y, 1.0))

    student = Normed()
    OnPolicyKD(["y_0", "y_1"]).loss(student, teacher)
    assert student.training
    assert student.norm.num_batches_tracked == 1


@pytest.mark.parametrize("options", [{}, {"compile": {"backend": None}}], ids=["eager", "captured"])
def test_distiller_trains_with_a_schedule(options):
    student, teacher = Walk(1.5), freeze(Walk(0.5))
    distiller = Distiller(
        student,
        teacher,
        lambda params: torch.optim.Adam(params, lr=0.05),
        OnPolicyKD(TARGETS, student_fraction=0.0),
        student_fraction=linear(0.0, 1.0, 40),
        **options,
    )
    distiller.fit(100, steps=80, progress=False)
    assert student.slope.item() == pytest.approx(0.5, abs=0.02)


def test_captured_it_equals_the_eager_loss():
    student, teacher = Walk(1.5), freeze(Walk(0.5))
    eager, captured = OnPolicyKD(TARGETS), OnPolicyKD(TARGETS).compile(backend=None)
    for fraction in (1.0, 0.3, 0.6, 0.0):
        found = []
        for loss in (eager, captured):
            loss.student_fraction = fraction
            pyro.set_rng_seed(2)
            student.zero_grad()
            value = loss(student, teacher)(100)
            value.backward()
            found.append((value.detach(), student.slope.grad.clone()))
        assert_close(*found)
    assert captured._pairs._pairs[0].captured._capture.num_graphs == 3  # 1, between, 0


def test_reports_work_on_it():
    student, teacher, loss = Walk(1.5), freeze(Walk(0.5)), OnPolicyKD(TARGETS)
    assert check(loss, student, teacher, 50).is_ok
    report = site_report(loss, student, teacher, 1000, num_samples=5)
    assert [row.name for row in report.sites] == TARGETS
    data = to_inference_data(loss, student, teacher, 50, num_samples=3)
    assert data is not None
    assert repr(loss) == "OnPolicyKD(targets=['y_0', 'y_1', 'y_2'], latent_weight=0.0, student_fraction=1.0)"


@pytest.mark.parametrize(
    ("fraction", "error", "text"),
    [
        (1.5, ValueError, r"student_fraction of site 'y_0' is 1.5, but must be a probability"),
        ({"y_0": 1.0}, ValueError, "student_fraction has no entry for"),
    ],
)
def test_a_wrong_fraction_names_the_site(fraction, error, text):
    with pytest.raises(error, match=text):
        OnPolicyKD(TARGETS, student_fraction=fraction).loss(Walk(1.5), freeze(Walk(0.5)), 10)


def test_a_schedule_for_a_loss_without_the_students_history_is_an_error():
    with pytest.raises(TypeError, match="LocalKD has no student_fraction to schedule: use OnPolicyKD"):
        DistillationObjective(LocalKD(TARGETS), Walk(1.0), freeze(Walk(0.0)), student_fraction=linear(1.0, 0.0, 10))
