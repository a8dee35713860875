"""The hierarchical VAE: the paper's sizes, sites, the ladder posterior, and distillation of it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from models.hierarchical_vae import HierarchicalVAE, Stage, moments_of
from pyro_kd import LocalKD, freeze
from tests.support.losses import SurrogateKD

LATENTS = [f"z{layer}" for layer in range(5, 0, -1)]


@pytest.mark.parametrize(
    ("size", "width", "written"), [(32, 128, "5.39M"), (32, 32, "367k"), (64, 128, "6.60M"), (64, 32, "443k")]
)
def test_the_papers_sizes(size, width, written):
    count = sum(p.numel() for p in HierarchicalVAE(size, width).parameters())
    assert written == (f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count / 1e3:.0f}k")


@pytest.mark.parametrize(("size", "sides"), [(32, [1, 2, 4, 8, 16]), (64, [1, 4, 8, 16, 32])])
def test_sites_have_the_documented_shapes(size, sides):
    vae = HierarchicalVAE(size, 4, channels=1, latents=3)
    x = torch.rand(2, 1, size, size)
    model = poutine.trace(vae.model).get_trace(2)
    guide = poutine.trace(vae.guide).get_trace(2, x)
    for trace in (model, guide):
        drawn = [name for name, node in trace.nodes.items() if node["type"] == "sample" and name.startswith("z")]
        assert drawn == LATENTS
        for name, side in zip(LATENTS, sides, strict=True):
            assert trace.nodes[name]["value"].shape == (2, 3, side, side)
    assert model.nodes["x"]["value"].shape == (2, 1, size, size)
    mean = model.nodes["_RETURN"]["value"]
    torch.testing.assert_close(model.nodes["x"]["fn"].mean, mean)
    assert 0 < mean.min() < mean.max() < 1
    torch.testing.assert_close(model.nodes["x"]["fn"].stddev, torch.full_like(mean, math.sqrt(0.05)))


@pytest.mark.parametrize("sides", [(1, 16), (1, 4), (1, 2, 8)])
def test_other_sides_make_other_layers(sides):
    vae = HierarchicalVAE(32, 4, channels=1, latents=3, sides=sides)
    x = torch.rand(2, 1, 32, 32)
    for trace in (poutine.trace(vae.model).get_trace(2), poutine.trace(vae.guide).get_trace(2, x)):
        found = {
            name: node["value"].shape for name, node in trace.nodes.items() if node["type"] == "sample" and name[0] == "z"
        }
        assert found == {f"z{len(sides) - i}": (2, 3, side, side) for i, side in enumerate(sides)}
    assert vae.model(2).shape == x.shape


@pytest.mark.parametrize("sides", [(2, 8), (1, 32), (1, 8, 4), (1, 4, 6), (1, 3)])
def test_sides_that_do_not_grow_by_doubling_are_refused(sides):
    with pytest.raises(ValueError, match="sides must be 1, then growing powers of 2 up to 16, half the size, not"):
        HierarchicalVAE(32, 4, sides=sides)


def test_a_size_that_is_not_32_or_64_is_refused():
    with pytest.raises(ValueError, match="size must be 32 or 64, not 28"):
        HierarchicalVAE(28, 4)


def test_the_posterior_is_the_product_of_evidence_and_prior():
    """By quadrature: the normalised product of two normal densities, at a layer in the middle."""
    vae = HierarchicalVAE(32, 4, latents=2).eval()
    x = torch.rand(1, 3, 32, 32)
    guide = poutine.trace(vae.guide).get_trace(1, x)
    hidden, evidence = x, []
    with torch.no_grad():
        for stage in vae.bottom_up:
            hidden, summary = stage(hidden)
            evidence.append(moments_of(summary))
        below = evidence[3]  # of z4
        above = moments_of(vae.top_down[0](guide.nodes["z5"]["value"])[1])
        torch.testing.assert_close(guide.nodes["z5"]["fn"].mean, evidence[4][0])
        grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
        pick = (0, 0, 0, 0)
        density = sum(dist.Normal(m[pick].double(), s[pick].double()).log_prob(grid) for m, s in (below, above)).exp()
        density /= density.sum()
        mean = (density * grid).sum()
        variance = (density * (grid - mean).square()).sum()
        posterior = guide.nodes["z4"]["fn"]
        assert abs(posterior.mean[pick] - mean) < 1e-4
        assert abs(posterior.stddev[pick] - variance.sqrt()) < 1e-4


def test_the_elbo_is_the_sum_of_its_layers():
    vae = HierarchicalVAE(32, 4, latents=2).eval()
    x = torch.rand(3, 3, 32, 32)
    pyro.set_rng_seed(0)
    loss = TraceMeanField_ELBO().differentiable_loss(vae.model, vae.guide, 3, x)
    pyro.set_rng_seed(0)
    guide = poutine.trace(vae.guide).get_trace(3, x)
    model = poutine.trace(poutine.replay(vae.model, guide)).get_trace(3, x)
    error = (x - model.nodes["_RETURN"]["value"]).square().sum()
    by_hand = error / (2 * 0.05) + 0.5 * x.numel() * math.log(2 * math.pi * 0.05)
    for name in LATENTS:
        q, p = guide.nodes[name]["fn"], model.nodes[name]["fn"]
        by_hand = (
            by_hand
            + (p.stddev.log() - q.stddev.log() + (q.variance + (q.mean - p.mean).square()) / (2 * p.variance) - 0.5).sum()
        )
    torch.testing.assert_close(loss, by_hand, rtol=1e-4, atol=1e-2)


def test_upsampling_after_the_short_cut_is_the_same_as_before():
    """The short cut is 1 x 1, so that nearest-neighbour upsampling commutes with it."""
    stage = Stage(3, 4, 2, [2.0]).eval()
    block = stage.blocks[0]
    x = torch.randn(2, 3, 4, 4)
    large = torch.nn.functional.interpolate(x, scale_factor=2)
    expected = block.second_norm(block.second(block.first_norm(block.first(large)).relu())) + block.short_cut(large)
    torch.testing.assert_close(block(x), expected.relu())


@pytest.mark.parametrize("loss", [SurrogateKD(["x"], latent_weight=1.0), LocalKD(["x"])])
def test_a_model_is_its_own_student(loss):
    vae = HierarchicalVAE(32, 4, latents=2).eval()
    assert loss.loss(vae.model, freeze(vae.model), 3) == 0.0


def test_students_are_trained_by_every_loss():
    teacher = freeze(HierarchicalVAE(32, 6, latents=2).model)
    pyro.clear_param_store()
    student = HierarchicalVAE(32, 4, latents=2)
    for loss in (SurrogateKD(["x"]), LocalKD(["x"])):
        student.zero_grad()
        loss.differentiable_loss(student.model, teacher, 3).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in student.top_down.parameters())
        assert all(p.grad is None for p in student.bottom_up.parameters())
    x = torch.rand(3, 3, 32, 32)
    Trace_ELBO().differentiable_loss(student.model, student.guide, 3, x).backward()
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("size", [28, 24, 12, 7, 1])
def test_sizes_that_it_cannot_make_are_refused(size):
    with pytest.raises(ValueError, match="size must be a power of 2"):
        HierarchicalVAE(size, 4, sides=(1,))
