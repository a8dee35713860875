"""The hierarchical VAE of several tasks: the paper's size, what the task changes, and the learned top priors."""

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

from models.conditional_vae import ConditionalVAE
from models.hierarchical_vae import moments_of
from pyro_kd import freeze
from tests.support.losses import SurrogateKD


def test_the_papers_size():
    assert f"{sum(p.numel() for p in ConditionalVAE(32, 64).parameters()) / 1e6:.2f}M" == "1.36M"


def test_each_task_has_its_own_prior():
    vae = ConditionalVAE(32, 4, tasks=3, latents=2)
    for task in range(3):
        fn = poutine.trace(vae.model).get_trace(2, task).nodes["z5"]["fn"]
        mean, std = moments_of(vae.top_prior.weight[:, task][None, :, None, None])
        torch.testing.assert_close(fn.mean, mean.expand(2, -1, -1, -1))
        torch.testing.assert_close(fn.stddev, std.expand(2, -1, -1, -1))


def test_the_task_reaches_every_layer():
    """On the same noise and the same z, a different task gives different moments at each site of model and guide."""
    vae = ConditionalVAE(32, 4, latents=2).eval()
    x = torch.rand(2, 3, 32, 32)
    traces = [poutine.trace(vae.guide).get_trace(2, 0, x)]
    traces.append(poutine.trace(poutine.replay(vae.guide, traces[0])).get_trace(2, 1, x))
    models = [poutine.trace(poutine.replay(vae.model, traces[0])).get_trace(2, task) for task in (0, 1)]
    for name in ("z5", "z4", "z3", "z2", "z1"):
        for one, two in (traces, models):
            assert not torch.allclose(one.nodes[name]["fn"].mean, two.nodes[name]["fn"].mean)
    assert not torch.allclose(models[0].nodes["x"]["fn"].mean, models[1].nodes["x"]["fn"].mean)


def test_the_prior_of_a_task_learns_from_its_data_alone():
    vae = ConditionalVAE(32, 4, latents=2)
    TraceMeanField_ELBO().differentiable_loss(vae.model, vae.guide, 3, 1, torch.rand(3, 3, 32, 32)).backward()
    grad = vae.top_prior.weight.grad
    assert grad[:, 1].abs().sum() > 0
    assert grad[:, 0].abs().sum() == 0


def test_distillation_holds_the_old_task():
    """The loss is zero where nothing has changed, and is not where the prior of the old task has."""
    vae = ConditionalVAE(32, 4, latents=2).eval()
    old = freeze(vae.model)
    loss = SurrogateKD(["x"])
    assert loss.loss(vae.model, old, 3, 0) == 0.0
    with torch.no_grad():
        vae.top_prior.weight[:, 1] += 1
    assert loss.loss(vae.model, old, 3, 0) == 0.0
    with torch.no_grad():
        vae.top_prior.weight[:, 0] += 1
    assert loss.loss(vae.model, old, 3, 0) > 0
    pyro.clear_param_store()
