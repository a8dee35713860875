"""A report or a metric leaves every random stream as it was; its noise depends on the streams, or on its seed."""

import inspect
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import diagnosis, metrics
from tests.support.losses import SurrogateKD


def coin(heads):
    def model():
        with pyro.plate("rows", 200):
            z = pyro.sample("z", dist.Bernoulli(heads))
            pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * z))

    return model


class Classifier:
    """One that draws as it is fitted."""

    def fit(self, values, labels):
        torch.randn(3), np.random.rand(3), random.random()
        self.share = labels.mean()
        return self

    def predict_proba(self, values):
        return np.tile([1 - self.share, self.share], (len(values), 1))


HEADS = torch.tensor(0.7, requires_grad=True)
PAIR = coin(HEADS), coin(0.5)
X, Y = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)), torch.ones(60, 2)
COUNTS = X.round().long()[:, 0], Y.long()[:, 0]
LOSS = SurrogateKD(["y"])

REPORTS = {
    "bound_report": lambda **seed: diagnosis.bound_report(*PAIR, ["y"], num_samples=5, classifier_rows=400, **seed),
    "check": lambda: diagnosis.check(LOSS, *PAIR),
    "site_report": lambda **seed: diagnosis.site_report(LOSS, *PAIR, num_samples=2, **seed),
    "to_inference_data": lambda **seed: diagnosis.to_inference_data(LOSS, *PAIR, num_samples=2, **seed),
    "count_kl": lambda: metrics.count_kl(*COUNTS),
    "density_ratio_kl": lambda: metrics.density_ratio_kl(X, Y + X, classifier=Classifier()),
    "emd": lambda: metrics.emd(X, Y),
    "fid": lambda: metrics.fid(X, Y + X),
    "frechet_distance": lambda: metrics.frechet_distance(X.mean(0), X.T.cov(), Y.mean(0), X.T.cov()),
    "gaussian": lambda: metrics.gaussian(X, 1.0),
    "histogram_kl": lambda: metrics.histogram_kl(X[:, 0], Y[:, 0] + X[:, 0]),
    "laplacian": lambda: metrics.laplacian(X, 1.0),
    "marginal_kl": lambda **seed: metrics.marginal_kl(*PAIR, ["y"], **seed),
    "marginal_log_prob": lambda: metrics.marginal_log_prob(PAIR[0], {"y": torch.ones(200)}),
    "mmd": lambda: metrics.mmd(X, Y),
    "nearest_neighbour_accuracy": lambda: metrics.nearest_neighbour_accuracy(X, Y),
    "rational_quadratic": lambda: metrics.rational_quadratic(X.square(), 1.0),
}
SEEDED = {
    "bound_report": lambda report: report.surrogate.mean,
    "site_report": lambda report: report.loss.mean,
    "to_inference_data": lambda pair: float(pair.teacher["prior"]["z"].mean()),
    "marginal_kl": lambda kl: kl.mean,
}


def streams():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()


def test_every_report_and_metric_is_here():
    public = [(room, name) for room in (diagnosis, metrics) for name in room.__all__]
    assert {name for room, name in public if inspect.isfunction(getattr(room, name))} == set(REPORTS)


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_leaves_the_random_streams_as_they_were(name):
    before = streams()
    REPORTS[name]()
    assert streams() == before


@pytest.mark.parametrize("name", SEEDED)
def test_the_noise_of_a_report_follows_the_stream_or_its_seed(name):
    def figure(**seed):
        before = streams()
        value = SEEDED[name](REPORTS[name](**seed))
        assert streams() == before
        return value

    pyro.set_rng_seed(1)
    first = figure()
    assert figure() == first
    assert figure(seed=1) == first
    assert figure(seed=2) != first
    torch.randn(1)
    assert figure() != first
    assert figure(seed=1) == first
