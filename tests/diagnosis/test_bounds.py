"""The bounds on the KL from both sides, against closed forms and sums over all states."""

import json
import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import nn

from pyro_kd import LocalKD, freeze
from pyro_kd.diagnosis.bounds import bound_report
from pyro_kd.errors import SupportMismatchError, UnknownTargetError
from tests.support.gaussian_programs import gaussian
from tests.support.losses import SurrogateKD


def coin(heads, rows=300):
    def model():
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(heads))
            pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * z))

    return model


def bernoulli_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_the_bounds_of_coins():
    report = bound_report(coin(0.7), coin(0.5), ["y"], num_samples=10)
    assert report.rows == 300
    assert report.reasons == {}
    assert report.local.mean == pytest.approx(bernoulli_kl(0.5, 0.7), rel=1e-4)
    assert report.exact.mean == pytest.approx(bernoulli_kl(0.5, 0.62), rel=1e-4)
    assert report.exact.standard_error == 0
    # On shared noise the latents differ in a fifth of the rows, where the KL is 0.6 log 4.
    assert report.surrogate.mean == pytest.approx(0.2 * 0.6 * math.log(4), abs=5 * report.surrogate.standard_error)
    assert report.exact.mean < min(report.local.mean, report.surrogate.mean)


def test_bounds_of_gaussians_have_no_exact_kl(float64):
    report = bound_report(gaussian(0.6), gaussian(0.0), "x", num_samples=3)
    assert report.surrogate.mean == pytest.approx(0.72)
    assert report.local.mean == pytest.approx(0.18)
    assert report.exact is None
    assert "latent site 'z' is Normal" in report.reasons["exact"]
    lines = str(report).splitlines()
    assert lines[3].split() == ["exact", "-", "-"]
    assert lines[-2].startswith("exact: latent site 'z' is Normal")
    assert "Trace Shapes" not in str(report)
    assert json.loads(json.dumps(report.to_dict()))["exact"] is None


def test_site_map_and_fresh_sites_are_passed_on():
    def student():
        with pyro.plate("rows", 200):
            w = pyro.sample("w", dist.Bernoulli(0.7))
            pyro.sample("extra", dist.Bernoulli(0.5))
            pyro.sample("out", dist.Bernoulli(0.2 + 0.6 * w))

    report = bound_report(student, coin(0.5, 200), ["y"], num_samples=4, site_map={"w": "z", "out": "y"}, fresh=["extra"])
    assert report.local.mean == pytest.approx(bernoulli_kl(0.5, 0.7), rel=1e-4)
    assert report.exact.mean == pytest.approx(bernoulli_kl(0.5, 0.62), rel=1e-4)


def test_latents_that_cannot_be_compared_have_no_local_bound():
    def program(width):
        def model():
            z = pyro.sample("z", dist.Bernoulli(torch.full((width,), 0.5)).to_event(1))
            pyro.sample("y", dist.Bernoulli(0.2 + 0.2 * z[..., 0] + 0.2 * z[..., -1]))

        return model

    report = bound_report(program(3), program(2), ["y"], num_samples=4)
    assert report.local is None
    assert "'z'" in report.reasons["local"]
    assert report.exact.mean == pytest.approx(0.0, abs=1e-6)
    assert "local bound: " in str(report)


def test_all_rows_of_a_subsampled_plate_count():
    def program(loc):
        def model():
            with pyro.plate("rows", 100, subsample_size=10):
                pyro.sample("x", dist.Normal(loc, 1.0))

        return model

    report = bound_report(program(1.0), program(0.0), ["x"], num_samples=5)
    assert report.rows == 100
    assert report.surrogate.mean == pytest.approx(0.5)
    assert report.exact.mean == pytest.approx(0.5, abs=5 * report.exact.standard_error)
    assert report.reasons["lower"] == "plate 'rows' draws the rows that it takes"


def test_too_many_states_are_not_summed_over():
    def program():
        z = pyro.sample("z", dist.Bernoulli(torch.full((40,), 0.5)).to_event(1))
        pyro.sample("y", dist.Bernoulli(z.mean(-1)))

    report = bound_report(program, program, ["y"], num_samples=2)
    assert report.exact is None
    assert "1.1e+12 joint states" in report.reasons["exact"]


def test_a_program_that_does_not_broadcast_has_no_exact_kl():
    def program():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Bernoulli(0.9 if z else 0.1))

    report = bound_report(program, program, ["y"], num_samples=2)
    assert report.exact is None
    assert "does not broadcast" in report.reasons["exact"]


def test_errors_of_the_surrogate_loss_are_raised():
    with pytest.raises(UnknownTargetError, match="'w'"):
        bound_report(coin(0.5), coin(0.5), ["w"])
    with pytest.raises(SupportMismatchError):
        bound_report(coin(0.5), gaussian(0.0, rows=300), ["x"], site_map={"y": "x"}, fresh=["z"])
    with pytest.raises(ValueError, match="at least 1"):
        bound_report(coin(0.5), coin(0.5), ["y"], num_samples=0)


def test_targets_that_only_some_runs_have():
    def program(loc):
        def model():
            coin = pyro.sample("coin", dist.Bernoulli(0.5))
            if coin:
                pyro.sample("y", dist.Normal(loc, 1.0))

        return model

    report = bound_report(program(1.0), program(0.0), lambda site: True, num_samples=40)
    assert 0.15 < report.surrogate.mean < 0.35  # half of 1 / 2
    assert report.surrogate.mean == pytest.approx(report.local.mean, abs=0.25)
    assert (report.exact is None) == ("exact" in report.reasons)
    assert report.reasons["lower"] == "which targets a run has, or their shapes, depends on its draws"


def test_the_bounds_of_a_frozen_teacher():
    assert bound_report(coin(0.7), freeze(coin(0.5)), ["y"], num_samples=2).exact.num_samples == 2


# The sandwich.


def test_the_lower_bound_and_the_distance_of_gaussians(float64):
    """y ~ N(delta, 1 + s^2) against N(0, 1 + s^2): KL = delta^2 / 2 (1 + s^2); on shared noise y is off by delta."""
    report = bound_report(gaussian(0.6, rows=1000), gaussian(0.0, rows=1000), "x", num_samples=3)
    exact = 0.36 / 2.5
    assert exact / 2 < report.lower.limit <= exact
    assert abs(report.lower.estimate.mean - exact) < 6 * report.lower.estimate.standard_error
    assert report.interval == (report.lower.limit, pytest.approx(0.18))
    assert report.distance.mean == pytest.approx(0.36)
    assert not report.is_inconsistent
    text = str(report)
    assert f">= {report.lower.limit:.4g}" in text
    assert "the KL lies between" in text
    assert "squared distance on shared noise: 0.36 ±" in text
    assert json.loads(json.dumps(report.to_dict()))["lower"]["limit"] == report.lower.limit


def test_equal_programs_have_a_lower_limit_of_zero():
    report = bound_report(coin(0.5, 2000), coin(0.5, 2000), "y", num_samples=2)
    assert report.interval == (0.0, pytest.approx(0.0, abs=1e-9))
    assert report.distance.mean == 0.0


def test_the_limits_of_the_upper_bounds_hold_together():
    """Six bounds, each at a level of 1 - 0.025 / 6 one-sided, by Student's t with 9 degrees of freedom."""
    others = {"again": LocalKD(["y"]), "half": SurrogateKD(["y"], latent_weight=0.0)}
    report = bound_report(coin(0.7), coin(0.5), "y", num_samples=10, upper_bounds=others, sample_numbers=[8, 2])
    assert list(report.upper_bounds) == ["again", "half", "8 samples", "2 samples", "local bound", "surrogate bound"]
    bound, limit = report.surrogate, report.upper_limits["surrogate bound"]
    quantile = scipy.stats.t(9).ppf(1 - 0.025 / 6)
    assert limit == pytest.approx(bound.mean + quantile * bound.standard_error, rel=1e-3)
    assert report.others["again"].mean == pytest.approx(report.local.mean)
    lines = [line.split()[0] for line in str(report).splitlines()[2:10]]
    assert lines == ["lower", "exact", "again", "half", "8", "2", "local", "surrogate"]


def test_a_single_run_has_no_upper_limit():
    report = bound_report(coin(0.7), coin(0.5), "y", num_samples=1)
    assert report.interval[1] == math.inf
    assert "<= inf" in str(report)


def test_a_bound_that_does_not_hold_is_noticed():
    class Wrong(LocalKD):
        def combine(self, particles):
            return 0 * super().combine(particles)

    with pytest.warns(UserWarning, match="INCONSISTENT: the lower limit .* is above an upper limit, 0, at a level of 95 %"):
        report = bound_report(coin(0.9, 2000), coin(0.2, 2000), "y", num_samples=2, upper_bounds={"wrong": Wrong("y")})
    assert report.is_inconsistent
    assert "INCONSISTENT" in str(report)
    assert report.to_dict()["is_inconsistent"]


def test_too_few_rows_have_no_lower_bound():
    report = bound_report(coin(0.7, 5), coin(0.5, 5), "y", num_samples=3)
    assert report.lower is None
    assert "there are 150 rows of each program, too few" in report.reasons["lower"]
    assert report.interval[0] == 0.0
    assert report.distance is not None


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    report = bound_report(gaussian(0.6, rows=200), gaussian(0.0, rows=200), "x", num_samples=2)
    assert "pip install scikit-learn" in report.reasons["lower"]


def test_rows_that_share_a_latent_count_together():
    """The student's rows share a latent, and the teacher's do not: the lower bound is that of a whole run, by its rows."""

    def student():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Bernoulli(0.1 + 0.8 * z))

    def teacher():
        with pyro.plate("rows", 2):
            z = pyro.sample("w", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Bernoulli(0.1 + 0.8 * z))

    report = bound_report(student, teacher, "y", num_samples=40, fresh=["z", "w"])
    q = torch.tensor([0.41, 0.09, 0.09, 0.41])
    exact = float((0.25 * (0.25 / q).log()).sum()) / 2
    assert report.rows == 2
    assert (
        report.exact.mean == pytest.approx(exact, rel=1e-4)
        or abs(report.exact.mean - exact) < 5 * report.exact.standard_error
    )
    assert 0 < report.lower.limit <= exact


def test_memory_and_time_of_the_programs():
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 3)
            self.register_buffer("shift", torch.zeros(4))

        def forward(self):
            with pyro.plate("rows", 50):
                pyro.sample("y", dist.Normal(self.net(torch.ones(50, 1))[:, 0] + self.shift[0], 1.0))

    report = bound_report(Student(), freeze(Student()), "y", num_samples=2)
    assert report.costs["student"].bytes == report.costs["teacher"].bytes == 4 * (3 + 3 + 4)
    assert 0 < report.costs["student"].seconds < 0.1
    assert "student: 40 B, " in str(report)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"level": 1.0}, ValueError, "level must be between 0 and 1, such as 0.95, not 1.0"),
        ({"sample_numbers": 16}, TypeError, r"whole numbers K of at least 2, such as \(4, 16, 64\).*not 16"),
        ({"sample_numbers": (4, 2.5)}, TypeError, "whole numbers K of at least 2.*not 2.5"),
        ({"sample_numbers": (1, 4)}, ValueError, "not 1; one sample is the surrogate bound"),
        ({"upper_bounds": {"mine": 3}}, TypeError, r"upper_bounds\['mine'\] must be a distillation loss.*not 3"),
    ],
)
def test_wrong_options_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        bound_report(coin(0.5), coin(0.5), "y", **options)


def test_rows_of_a_plate_without_a_size():
    def program():
        with pyro.plate("rows"):
            pyro.sample("y", dist.Normal(torch.zeros(40), 1.0))

    report = bound_report(program, freeze(program), "y", num_samples=2)
    assert report.rows == 40


def test_a_value_that_is_given_outside_of_the_plate_is_an_input():
    def program():
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 40):
            pyro.sample("y", dist.Normal(weight, 1.0))

    given = poutine.condition(program, {"weight": torch.tensor(0.5)})
    assert bound_report(given, freeze(given), "y", num_samples=2).rows == 40
    assert bound_report(program, freeze(program), "y", num_samples=2).rows == 1


def test_the_cost_is_that_of_runs_for_the_lower_bound():
    """As docs/certificate.md says: a run serves as many of the classifier's rows as the call has, and the number of runs has a limit."""
    runs = []

    def program(rows):
        runs.append(rows)
        with pyro.plate("rows", rows):
            pyro.sample("y", dist.Normal(0.0, 1.0))

    def number(rows, wanted, num_samples=2):
        runs.clear()
        bound_report(
            program, freeze(program), ["y"], rows, num_samples=num_samples, sample_numbers=(), classifier_rows=wanted
        )
        return len(runs)

    each = number(50, 550) - number(50, 500)
    assert each > 0
    assert number(50, 800) - number(50, 500) == 6 * each
    assert number(25, 500, 3) - number(50, 500, 3) == 10 * each
    assert number(50, 100_000) == number(50, 50 * 20)
