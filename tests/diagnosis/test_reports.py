"""Reports by site and of the bounds, against closed forms."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import LocalKD
from pyro_kd.diagnosis import check, site_report
from pyro_kd.divergences import wasserstein2
from pyro_kd.metrics import Estimate
from tests.support.gaussian_programs import gaussian
from tests.support.losses import SurrogateKD

# By site.


def test_the_gaussian_example(float64):
    """10 rows, delta = 0.6, s = 0.5: terms delta^2 / 2 at z and delta^2 / (2 s^2) at x, gradients delta and delta / s^2."""
    loc = torch.tensor(0.6, requires_grad=True)
    report = site_report(SurrogateKD(["x"], latent_weight=0.1, num_particles=4), gaussian(loc), gaussian(0.0), num_samples=7)
    z, x = report.sites
    assert (z.name, z.kind, z.batch_shape, z.event_shape) == ("z", "latent", (10,), ())
    assert (x.name, x.kind, x.noise, x.divergence, x.analytic) == ("x", "target", "given", "kl", True)
    assert (z.weight, x.weight) == (0.1, 1.0)
    assert z.term.mean == pytest.approx(10 * 0.18)
    assert x.term.mean == pytest.approx(10 * 0.72)
    assert x.term.standard_error == pytest.approx(0.0, abs=1e-9)
    assert z.gradient_norm == pytest.approx(0.1 * 10 * 0.6)
    assert x.gradient_norm == pytest.approx(10 * 2.4)
    assert report.loss.mean == pytest.approx(7.38)
    assert report.loss.num_samples == 7
    assert z.share == pytest.approx(0.18 / 7.38)
    assert z.share + x.share == pytest.approx(1.0)
    assert loc.grad is None
    assert report.unit == "nats"


def test_the_standard_error_of_a_monte_carlo_term(float64):
    """log p - log q of N(0, 1) against N(delta, 1) at a draw is delta^2 / 2 - delta y, with variance delta^2 per row."""

    def program(loc):
        def model():
            with pyro.plate("rows", 10):
                pyro.sample("y", dist.Normal(loc, 1.0))

        return model

    loss = SurrogateKD(["y"], divergence=lambda p, q, value: p.log_prob(value) - q.log_prob(value))
    loc = torch.tensor(0.6, requires_grad=True)
    row = site_report(loss, program(loc), program(0.0), num_samples=400)["y"]
    error = 0.6 * math.sqrt(10 / 400)
    assert row.term.standard_error == pytest.approx(error, rel=5 / math.sqrt(2 * 400))
    assert row.term.mean == pytest.approx(1.8, abs=5 * error)
    assert row.analytic is None
    # The gradient of the mean: 10 (delta - mean of y), not the mean of the norms.
    assert row.gradient_norm == pytest.approx(6.0, abs=5 * math.sqrt(10 / 400))


def test_gradients_of_every_kind_of_parameter_count():
    """Counted are pyro.param (its unconstrained tensor), a registered module, and a tensor in the closure, but not gradients of the
    teacher or of arguments."""
    net, hidden = nn.Linear(1, 1), torch.tensor(0.5, requires_grad=True)
    nn.init.constant_(net.weight, 2.0)
    teacher_loc, shift = torch.tensor(3.0, requires_grad=True), torch.tensor([1.0], requires_grad=True)

    def student(shift):
        pyro.module("net", net)
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("x", dist.Normal(net(shift) + hidden, scale).to_event(1))

    def teacher(shift):
        pyro.sample("x", dist.Normal(teacher_loc + 0 * shift, 1.0).to_event(1))

    row = site_report(SurrogateKD(["x"]), student, teacher, shift, num_samples=2)["x"]
    mean = (net(shift) + hidden).item()
    slope = (mean - 3.0) / 4.0  # of the KL with respect to the mean; weight, bias and hidden each have this gradient
    by_log_scale = 1 - (1 + (mean - 3.0) ** 2) / 4.0
    assert row.gradient_norm == pytest.approx(math.sqrt(3 * slope**2 + by_log_scale**2), rel=1e-4)


def test_the_mechanism_of_each_site_is_named():
    class Doubled(dist.Normal):
        def rsample(self, sample_shape=()):
            return self.loc + self.scale * torch.randn(self._extended_shape(sample_shape))

    def program(shift, width, continuous, name):
        def model():
            pyro.sample("direct", dist.Normal(shift, 1.0).expand([2]).to_event(1))
            pyro.sample("tape", Doubled(torch.tensor(shift), 1.0))
            pyro.sample("explicit", dist.Dirichlet(torch.ones(3) + shift))
            pyro.sample("inside", dist.BetaBinomial(2.0 + shift, 3.0, 10))
            pyro.sample("converted", continuous(torch.tensor(shift), 1.0))
            pyro.sample("wider", dist.Normal(torch.zeros(width), 1.0).to_event(1))
            pyro.sample("point", dist.Delta(torch.tensor(shift)))
            pyro.sample(name, dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(0.0, 1.0 + shift))

        return model

    weights = {"wider": 0.0, "point": 0.0}
    loss = SurrogateKD(["y"], latent_weight=lambda site: weights.get(site, 0.1), fresh=["mine", "yours"])
    report = site_report(loss, program(0.5, 3, dist.Laplace, "mine"), program(0.0, 2, dist.Normal, "yours"), num_samples=2)
    assert {row.name: row.noise for row in report.sites} == {
        "direct": "direct",
        "tape": "tape",
        "explicit": "explicit map",
        "inside": "explicit map inside",
        "converted": "converted",
        "wider": "partly shared",
        "point": "no noise",
        "y": "given",
        "mine": "fresh",
        "yours": "fresh",
    }
    assert report["wider"].term is None
    assert report["wider"].share is None
    assert report["point"].term.mean == pytest.approx(0.25), "a comparable site of weight 0 has a term"
    assert report["point"].share == 0.0
    assert report["point"].gradient_norm == 0.0
    assert report["mine"].term is None
    assert report["converted"].analytic is True
    local = site_report(
        LocalKD(["y"], fresh=["mine", "yours"], latent_weight=loss.latent_weight),
        *[program(0.5, 2, dist.Normal, n) for n in ("mine", "yours")],
    )
    assert {row.noise for row in local.sites if row.weight != 0} == {"given", "fresh"}
    assert {row.name: row.noise for row in local.sites if row.weight == 0} == {"wider": "direct", "point": "no noise"}


def test_a_site_that_some_runs_lack_counts_as_0():
    """The terms add up to the loss: a run without the site counts as 0."""

    def program(loc):
        def model():
            coin = pyro.sample("coin", dist.Bernoulli(0.5))
            if coin:
                pyro.sample("z", dist.Normal(loc, 1.0))

        return model

    report = site_report(SurrogateKD(["coin"], latent_weight=1.0), program(1.0), program(0.0), num_samples=100)
    assert 0.25 < report["z"].term.mean / 0.5 < 0.75
    assert report.loss.mean == pytest.approx(report["z"].term.mean)


def test_equal_programs_have_no_shares():
    report = site_report(SurrogateKD(["x"]), gaussian(0.0), gaussian(0.0), num_samples=3)
    assert report.loss == Estimate(0.0, 0.0, 3)
    assert [row.share for row in report.sites] == [None, None]
    assert "0 ± 0" in str(report)


def test_the_table_and_the_dictionary():
    report = site_report(SurrogateKD(["x"], latent_divergence=wasserstein2), gaussian(1.0), gaussian(0.0), num_samples=3)
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "site",
        "kind",
        "batch",
        "|",
        "event",
        "noise",
        "divergence",
        "computed",
        "term",
        "weight",
        "gradient",
        "share",
    ]
    assert lines[2].split()[:2] == ["z", "latent"]
    assert lines[2].endswith(" 4.8 %")  # 0.1 * 10 of 0.1 * 10 + 20
    assert len({line.index("%") for line in lines[2:4]}) == 1, "aligned"
    assert lines[-1] == "loss 21 ± 0 units of the divergence per call; ± standard error over 3 runs"
    rows = json.loads(json.dumps(report.to_dict()))["sites"]
    assert [row["name"] for row in rows] == ["z", "x"]
    assert rows[1]["term"]["mean"] == pytest.approx(20.0)
    with pytest.raises(KeyError, match="no site 'w'"):
        report["w"]


def test_the_report_under_no_grad_and_wrong_arguments():
    loc = torch.tensor(1.0, requires_grad=True)
    with torch.no_grad():
        assert site_report(SurrogateKD(["x"]), gaussian(loc), gaussian(0.0))["x"].gradient_norm == pytest.approx(40.0)
    with pytest.raises(ValueError, match="at least 1"):
        site_report(SurrogateKD(["x"]), gaussian(0.0), gaussian(0.0), num_samples=0)
    with pytest.raises(TypeError, match="distillation loss"):
        site_report(gaussian(0.0), gaussian(0.0), SurrogateKD(["x"]))


def test_check_and_site_report_name_the_same_things_alike():
    pair = gaussian(torch.tensor(1.0, requires_grad=True)), gaussian(0.0)
    checked, measured = check(SurrogateKD(["x"]), *pair).sites, site_report(SurrogateKD(["x"]), *pair, num_samples=2).sites
    names = "name", "kind", "batch_shape", "event_shape", "noise", "divergence", "analytic", "weight"
    assert [[getattr(row, name) for name in names] for row in checked] == [
        [getattr(row, name) for name in names] for row in measured
    ]
