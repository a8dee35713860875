"""The Bayesian classifier, and the network that stands for it."""

import pyro
import torch
from pyro import poutine

from models.bayesian_classifier import BayesianClassifier, Classifier
from pyro_kd import posterior_predictive


def test_sites_have_the_documented_shapes():
    model, x = BayesianClassifier(6, 3, 4), torch.rand(7, 6)
    trace = poutine.trace(model).get_trace(x)
    for name, shape in {"w1": (6, 3), "b1": (3,), "w2": (3, 4), "b2": (4,)}.items():
        assert trace.nodes[name]["fn"].event_shape == shape
        assert trace.nodes[name]["fn"].batch_shape == ()
    assert trace.nodes["label"]["fn"].batch_shape == (7,)
    assert poutine.trace(model).get_trace(x, torch.zeros(7, dtype=torch.long)).nodes["label"]["is_observed"]


def test_each_row_can_have_weights_of_its_own():
    pyro.set_rng_seed(0)
    model, x = BayesianClassifier(6, 3, 4), torch.rand(7, 6)
    samples = {name: torch.randn(5, *shape) for name, shape in model.shapes.items()}
    trace = poutine.trace(posterior_predictive(model, samples, rows=len)).get_trace(x)
    for row, index in enumerate(trace.nodes["draw"]["value"]):
        logits = model.logits(x[row : row + 1], {name: value[index] for name, value in samples.items()})
        torch.testing.assert_close(trace.nodes["label"]["fn"].probs[row], logits.softmax(-1)[0])


def test_the_scale_of_the_weights():
    pyro.set_rng_seed(0)
    trace = poutine.trace(BayesianClassifier(400, 25, 4, scale=2.0)).get_trace(torch.zeros(1, 400))
    assert abs(trace.nodes["w1"]["value"].std() - 0.1) < 5 * 0.1 / (2 * 10_000) ** 0.5
    assert abs(trace.nodes["w2"]["value"].std() - 0.4) < 5 * 0.4 / (2 * 100) ** 0.5


def test_the_network_has_the_label_alone():
    net = Classifier(6, 3, 4)
    trace = poutine.trace(net).get_trace(torch.rand(7, 6))
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample"] == ["rows", "label"]
    assert not poutine.trace(net.guide).get_trace(torch.rand(7, 6)).stochastic_nodes
