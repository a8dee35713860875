"""The variational recurrent network: sizes, sites, its ELBO by hand, and masks."""

import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.distributions import Bernoulli, Normal

from models.vrnn import VRNN


def drawings(rows=5, length=4):
    return torch.cat([torch.randn(rows, length, 2), torch.rand(rows, length, 1).bernoulli()], -1)


@pytest.mark.parametrize(("width", "recurrent", "count"), [(512, 1200, 14_412_227), (128, 600, 2_416_643)])
def test_the_papers_sizes(width, recurrent, count):
    """14.4M and 2.42M in the paper: generative and recognition networks together."""
    with torch.device("meta"):
        vrnn = VRNN(width, recurrent)
    assert sum(parameter.numel() for parameter in vrnn.parameters()) == count


def test_sites_have_the_documented_shapes():
    vrnn = VRNN(width=6, recurrent=7, latents=2)
    trace = poutine.trace(vrnn.model).get_trace(5, 4)
    for t in range(1, 5):
        assert trace.nodes[f"z{t}"]["value"].shape == (5, 2)
        assert trace.nodes[f"pen{t}"]["value"].shape == (5,)
        assert trace.nodes[f"move{t}"]["value"].shape == (5, 2)
        assert trace.nodes[f"z{t}"]["fn"].batch_shape == (5,)
    names = [name for name, site in trace.nodes.items() if site["type"] == "sample" and name != "rows"]
    assert names == [f"{kind}{t}" for t in range(1, 5) for kind in ("z", "pen", "move")]
    points = trace.nodes["_RETURN"]["value"]
    assert points.shape == (5, 4, 3)
    assert torch.equal(points[:, 2, :2], trace.nodes["move3"]["value"])
    assert torch.equal(points[:, 2, 2], trace.nodes["pen3"]["value"])
    x = drawings()
    assert torch.equal(vrnn.model(5, 4, x), x)
    assert vrnn.guide(5, 4, x).shape == (5, 4, 2)


def test_the_elbo_is_the_one_written_by_hand(float64):
    vrnn, x = VRNN(width=6, recurrent=7, latents=2, scale=0.5), drawings()
    guide = poutine.trace(vrnn.guide).get_trace(5, 4, x)
    model = poutine.trace(poutine.replay(vrnn.model, guide)).get_trace(5, 4, x)
    net, by_hand = vrnn.generative, 0.0
    hidden = cell = torch.zeros(5, 7)
    for t in range(4):
        z = guide.nodes[f"z{t + 1}"]["value"]
        point, latent = net["points"](x[:, t]), net["latents"](z)
        prior = net["prior"](hidden)
        posterior = vrnn.recognition(torch.cat([point, hidden], 1))
        output = net["decoder"](torch.cat([latent, hidden], 1))
        for sign, gaussian in ((1, prior), (-1, posterior)):
            by_hand += sign * Normal(gaussian[:, :2], gaussian[:, 2:].exp().sqrt()).log_prob(z).sum()
        by_hand += Bernoulli(logits=output[:, 0]).log_prob(x[:, t, 2]).sum()
        by_hand += Normal(output[:, 1:], 0.5).log_prob(x[:, t, :2]).sum()
        hidden, cell = net["cell"](torch.cat([point, latent], 1), (hidden, cell))
    torch.testing.assert_close(model.log_prob_sum() - guide.log_prob_sum(), by_hand)


def test_every_parameter_is_trained():
    vrnn = VRNN(width=6, recurrent=7, latents=2)
    Trace_ELBO().differentiable_loss(vrnn.model, vrnn.guide, 5, 4, drawings()).backward()
    assert all(parameter.grad is not None for parameter in vrnn.parameters())


def test_masked_points_contribute_nothing(float64):
    """The ELBO of padded drawings is the sum of those of the cut ones, on the same draws of z."""
    vrnn, x = VRNN(width=6, recurrent=7, latents=2), drawings()
    lengths = torch.tensor([4, 2, 1, 3, 2])
    mask = torch.arange(4) < lengths.unsqueeze(1)
    x = x * mask.unsqueeze(-1)

    z = {f"z{t}": torch.randn(5, 2) for t in range(1, 5)}

    def elbo(rows, x, mask):
        def log_prob(program):
            given = {name: value[rows] for name, value in z.items()}
            return poutine.trace(poutine.condition(program, given)).get_trace(len(x), x.shape[1], x, mask).log_prob_sum()

        return log_prob(vrnn.model) - log_prob(vrnn.guide)

    cut = sum(elbo([row], x[row : row + 1, :length], None) for row, length in enumerate(lengths))
    torch.testing.assert_close(elbo(range(5), x, mask), cut)
