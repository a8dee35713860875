"""The variational information bottleneck."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import Categorical, Normal, kl_divergence

from models.bottleneck import Bottleneck
from pyro_kd.training import ELBOObjective


@pytest.mark.parametrize("program", ["classify", "model"])
def test_sites_have_the_documented_shapes(program):
    net = Bottleneck(6, latents=3, classes=4, hidden=[5])
    trace = poutine.trace(getattr(net, program)).get_trace(torch.rand(7, 6))
    assert trace.nodes["z"]["value"].shape == (7, 3)
    assert trace.nodes["label"]["value"].shape == (7,)
    assert trace.nodes["_RETURN"]["value"].shape == (7, 4)
    assert not trace.nodes["label"]["is_observed"]
    given = poutine.trace(getattr(net, program)).get_trace(torch.rand(7, 6), torch.zeros(7, dtype=torch.long))
    assert given.nodes["label"]["is_observed"]


def test_prior_and_encoder():
    net, x = Bottleneck(6, latents=3, classes=4, hidden=[5]), torch.rand(7, 6)
    prior, guide, classifier = (poutine.trace(f).get_trace(x).nodes["z"]["fn"] for f in (net.model, net.guide, net.classify))
    assert torch.equal(prior.mean, torch.zeros(7, 3))
    assert torch.equal(prior.stddev, torch.ones(7, 3))
    assert torch.equal(guide.mean, classifier.mean)
    assert torch.equal(guide.stddev, classifier.stddev)


def test_parameters_by_hand():
    net = Bottleneck(64, latents=256, classes=10, hidden=[1024, 1024])
    encoder = (64 + 1) * 1024 + (1024 + 1) * 1024 + (1024 + 1) * 2 * 256
    assert sum(p.numel() for p in net.parameters()) == encoder + (256 + 1) * 10


def test_the_loss_by_hand():
    """The ELBO with its KL weighted by beta is the bottleneck's loss, at the same draw of z."""
    net, beta = Bottleneck(6, latents=3, classes=4, hidden=[5]).double(), 0.3
    x, label = torch.rand(7, 6, dtype=torch.float64), torch.arange(7) % 4
    objective = ELBOObjective(TraceMeanField_ELBO(), net.model, net.guide, latent_weight=lambda step: beta)
    pyro.set_rng_seed(1)
    value = objective.value(0, (x, label), {})
    pyro.set_rng_seed(1)
    code = net.code(x)
    z = code.rsample()
    divergence = kl_divergence(Normal(code.mean, code.stddev), Normal(0.0, 1.0)).sum()
    expected = -Categorical(logits=net.decoder(z)).log_prob(label).sum() + beta * divergence
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)


def test_predictions_are_averaged_over_codes():
    """One hidden code of one dimension: the mean of p(label | z) over z by quadrature."""
    net = Bottleneck(2, latents=1, classes=3, hidden=[4]).double()
    with torch.no_grad():
        net.decoder.weight.mul_(5)
    x, draws = torch.rand(5, 2, dtype=torch.float64), 20_000
    found = net.predict(x, draws)
    assert torch.allclose(found.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    code = net.code(x)
    grid = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    z = code.mean + code.stddev * grid
    weight = torch.exp(-grid.square() / 2) / torch.exp(-grid.square() / 2).sum()
    probs = net.decoder(z.unsqueeze(-1)).softmax(-1)
    exact = (weight[:, None] * probs).sum(1)
    variance = (weight[:, None] * probs.square()).sum(1) - exact.square()
    assert ((found.exp() - exact).abs() <= 5 * (variance / draws).sqrt()).all()
