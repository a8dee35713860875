"""The bounds on the KL from both sides, against closed forms and sums over all states."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import freeze
from pyro_kd.diagnosis.bounds import bound_report
from pyro_kd.errors import SupportMismatchError, UnknownTargetError
from tests.support.gaussian_programs import gaussian


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
    assert report.exact.mean == pytest.approx(bernoulli_kl(0.5, 0.62), abs=5 * report.exact.standard_error)
    assert 0 < report.exact.standard_error < 0.02
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
    assert lines[4].split() == ["exact", "-"]
    assert lines[-1].startswith("exact: latent site 'z' is Normal")
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
    assert report.exact.mean == pytest.approx(bernoulli_kl(0.5, 0.62), abs=5 * report.exact.standard_error)


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

    report = bound_report(program(1.0), program(0.0), ["x"], num_samples=2)
    assert report.rows == 100
    assert report.surrogate.mean == pytest.approx(0.5)
    assert "subsampled" in report.reasons["exact"]


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

    report = bound_report(program(1.0), program(0.0), lambda site: True, num_samples=60)
    assert 0.15 < report.surrogate.mean < 0.35  # half of 1 / 2
    assert report.surrogate.mean == pytest.approx(report.local.mean, abs=0.25)
    assert (report.exact is None) == ("exact" in report.reasons)


def test_the_bounds_of_a_frozen_teacher():
    assert bound_report(coin(0.7), freeze(coin(0.5)), ["y"], num_samples=2).exact.num_samples == 2
