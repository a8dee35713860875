"""The K-sample bounds of a report, against the exact KL by enumeration and against a closed form."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_kd
from models.helmholtz import HelmholtzMachine
from pyro_kd import freeze
from pyro_kd.diagnosis import sample_bounds
from tests.support.gaussian_programs import gaussian


def bound_report(*args, **options):
    """A report whose classifier sees few rows, which saves time."""
    return pyro_kd.bound_report(*args, classifier_rows=200, **options)


def bits(sign, rows=400):
    """Two bits; the student's mean the opposite of the teacher's, so that equal targets have large bounds."""

    def model():
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(0.5).expand([2]).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=sign * (2 * z.sum(-1) - 2)))

    return model


def machines(rows):
    pyro.set_rng_seed(3)
    student, teacher = HelmholtzMachine(2), HelmholtzMachine(4)
    return student.model, freeze(teacher.model), ["y1", "y2"], rows


def is_at_most(low, high, errors=4):
    return low.mean <= high.mean + errors * math.hypot(low.standard_error, high.standard_error)


@pytest.mark.parametrize(
    "case",
    [lambda: (bits(1.3), bits(-1.0), "y"), lambda: machines(250)],
    ids=["the batch as its own samples", "a run for each sample"],
)
def test_the_bounds_lie_between_the_exact_kl_and_the_surrogate_bound_and_do_not_increase(case):
    report = bound_report(*case(), num_samples=5)
    assert list(report.samples) == [4, 16, 64]
    few, more, many = report.samples.values()
    assert is_at_most(few, report.surrogate)
    assert is_at_most(more, few)
    assert is_at_most(many, more)
    assert is_at_most(report.exact, many)
    assert many.mean < report.surrogate.mean - 4 * report.surrogate.standard_error, "more samples are of use"


def test_the_bound_of_gaussians_tends_to_the_closed_form(float64):
    """y ~ N(delta, 1 + s^2) against N(0, 1 + s^2) has the KL delta^2 / 2 (1 + s^2), a fifth of the surrogate bound."""
    report = bound_report(gaussian(0.6, rows=1000), gaussian(0.0, rows=1000), "x", num_samples=5, sample_numbers=(200,))
    exact, found = 0.36 / 2.5, report.samples[200]
    assert exact - 4 * found.standard_error < found.mean < exact + 4 * found.standard_error + 5 / 200
    assert report.interval[1] == report.upper_limits["200 samples"]


def test_the_lines_of_a_report():
    report = bound_report(bits(1.3), bits(-1.0), "y", num_samples=5, sample_numbers=(8, 2, 8))
    lines = str(report).splitlines()
    assert [line.split("  ")[0] for line in lines[4:6]] == ["8 samples", "2 samples"], "the tighter bound stands above"
    assert report.to_dict()["samples"][8]["mean"] == report.samples[8].mean
    assert json.loads(json.dumps(report.to_dict()))["samples"]["2"]["num_samples"] == 5


def test_without_numbers_there_are_no_such_lines():
    report = bound_report(bits(1.3), bits(-1.0), "y", num_samples=3, sample_numbers=())
    assert report.samples == {}
    assert list(report.upper_bounds) == ["local bound", "surrogate bound"]


# Programs that it cannot serve.


def test_a_program_that_does_not_broadcast_has_no_bound_of_k_samples(monkeypatch):
    monkeypatch.setattr(sample_bounds, "FEWEST_ROWS", 1)

    def program():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with pyro.plate("draws", 3):
            pyro.sample("y", dist.Bernoulli(0.9 if z else 0.1))

    report = bound_report(program, program, "y", num_samples=2, sample_numbers=(4, 16))
    assert report.samples == {4: None, 16: None}
    assert "does not broadcast over 2 samples in an outer plate" in report.reasons["4 samples"]
    assert "MultiSampleKD(..., vectorize=False)" in report.reasons["16 samples"]
    assert "16 samples" not in report.upper_bounds
    lines = str(report).splitlines()
    assert lines[4].split() == ["16", "samples", "-", "-"]
    assert sum("4 samples, 16 samples: a program does not broadcast" in line for line in lines) == 1, (
        "the reason stands once"
    )


def test_few_rows_have_no_bound_of_k_samples():
    report = bound_report(bits(1.3, 30), bits(-1.0, 30), "y", num_samples=20)
    assert set(report.samples.values()) == {None}
    assert "all runs together have 600 rows, too few for a reliable limit: it takes 1000" in report.reasons["4 samples"]


def test_programs_without_latents_have_no_bound_of_k_samples():
    def program(loc):
        def model():
            with pyro.plate("rows", 1000):
                pyro.sample("y", dist.Normal(loc, 1.0))

        return model

    report = bound_report(program(0.5), program(0.0), "y", num_samples=2)
    assert "there are no latents" in report.reasons["64 samples"]
    assert report.interval[1] == pytest.approx(0.125)


def test_large_programs_take_fewer_runs_and_no_more_memory_than_allowed(monkeypatch):
    """A run of the two programs draws 200 rows of 8 bits and 2 numbers, and the student's latents: 3,600 numbers."""
    monkeypatch.setattr(sample_bounds, "MAX_DRAWN", 4 * 3600)
    report = bound_report(*machines(200), num_samples=10, sample_numbers=(2, 4, 5))
    assert report.samples[2].num_samples == report.samples[4].num_samples == 5
    assert report.samples[5] is None
    assert "one run of 5 samples draws 18,000 numbers, more than 14,400" in report.reasons["5 samples"]
    assert "over 10 runs (5 for 4 samples, 5 for 2 samples) of 200 rows" in str(report)


def test_the_batch_as_its_own_samples_needs_no_further_runs(monkeypatch):
    monkeypatch.setattr(sample_bounds, "MAX_DRAWN", 1)
    report = bound_report(bits(1.3), bits(-1.0), "y", num_samples=6, sample_numbers=(64,))
    assert report.samples[64].num_samples == 6


def test_it_leaves_the_student_and_the_store_as_they_are():
    student = HelmholtzMachine(2)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    bound_report(student.model, machines(200)[1], ["y1", "y2"], 200, num_samples=5)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(param.grad is None for param in student.parameters())
    assert set(pyro.get_param_store().keys()) <= {f"helmholtz$$${name}" for name, _ in student.generative.named_parameters()}
