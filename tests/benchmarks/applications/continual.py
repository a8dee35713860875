r"""The continual step of a conditional VAE of width 64: the ELBO of new data, weight r, and ours on old knowledge, weight 1 - r.

The negative ELBO has its KL in closed form. Old knowledge is the surrogate loss against the frozen old model, of the same sizes, on the
old task: squared W2 at the latents, its mean over a layer with weight 0.1, and KL at the image. The two models have different weights
here, as they have after some steps.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.nn.functional import one_hot

from models.conditional_vae import ConditionalVAE
from models.hierarchical_vae import Moments, moments_of
from pyro_kd import freeze
from pyro_kd.divergences import wasserstein2
from pyro_kd.training import ELBOObjective
from tests.benchmarks.applications.application import Application
from tests.support.losses import SurrogateKD

__all__ = ["build", "distillation_by_hand", "elbo_by_hand"]

LATENT_WEIGHT = 0.1
NEW_SHARE = 0.42  # of faces with the attribute Male in CelebA
OLD_TASK, NEW_TASK = 0, 1


def build(
    rows: int = 256,
    *,
    width: int = 64,
    latents: int = 16,
    size: int = 32,
    device: str = "cpu",
    memory_format: torch.memory_format = torch.preserve_format,
) -> Application:
    """The paper's sizes for images of 32 pixels."""
    old = ConditionalVAE(size, width, latents=latents).to(device, memory_format=memory_format).eval()
    vae = ConditionalVAE(size, width, latents=latents).to(device, memory_format=memory_format)
    x = torch.rand(rows, vae.channels, size, size, device=device).contiguous(memory_format=memory_format)
    frozen = freeze(old.model)

    def library(captured: bool, **options: Any) -> Callable[[], Tensor]:
        elbo: Any = TraceMeanField_ELBO()
        old_knowledge = SurrogateKD(
            ["x"], latent_weight=LATENT_WEIGHT, latent_divergence=wasserstein2, latent_reduction="mean"
        )(vae.model, frozen)
        new_data = ELBOObjective(elbo, vae.model, vae.guide)
        if captured:
            new_data = new_data.compiled(**options)
            old_knowledge.compile(**options)
        return lambda: new_weight * new_data.value(0, (rows, NEW_TASK, x), {}) + old_weight * old_knowledge(rows, OLD_TASK)

    new_weight, old_weight = NEW_SHARE / rows, (1 - NEW_SHARE) / rows
    return Application(
        name="continual",
        sizes=f"width {width}, {size} pixels, {rows} rows",
        student=vae,
        library=library(False),
        by_hand=lambda: new_weight * elbo_by_hand(vae, x) + old_weight * distillation_by_hand(vae, old, rows),
        captured=lambda **options: library(True, **options),
        model=vae.model,
        guide=vae.guide,
        args=(rows, NEW_TASK, x),
        learning_rate=1e-4,
    )


def elbo_by_hand(vae: ConditionalVAE, x: Tensor) -> Tensor:
    """The negative ELBO, summed over rows, in one pass up and one down; Pyro's programs go down twice, in guide and in model."""
    code = code_of(vae, len(x), NEW_TASK)
    hidden, evidence = x, []
    for stage in vae.bottom_up:
        hidden, summary = stage(hidden, code)
        evidence.append(moments_of(summary))
    mean, std = top_of(vae, code)
    terms = []
    for stage, (below_mean, below_std) in zip(vae.top_down, reversed(evidence), strict=True):
        below_precision, precision = below_std.pow(-2), std.pow(-2)
        total = below_precision + precision
        posterior_mean = (below_mean * below_precision + mean * precision) / total
        posterior_std = total.rsqrt()
        z = posterior_mean + noise_for(posterior_mean) * posterior_std
        ratio = (posterior_std / std).square()  # of the variances
        terms.append(0.5 * (ratio + ((posterior_mean - mean) / std).square() - 1 - ratio.log()).sum())
        summary = stage(z, code)[1]
        if stage is not vae.top_down[-1]:
            mean, std = moments_of(summary)
    constant = x.numel() * (math.log(vae.scale) + 0.5 * math.log(2 * math.pi))
    terms.append((x - summary.sigmoid()).square().sum() / (2 * vae.scale**2))
    return torch.stack(terms).sum() + constant


def distillation_by_hand(vae: ConditionalVAE, old: ConditionalVAE, rows: int) -> Tensor:
    """The surrogate loss, summed over rows; x is not drawn, since nothing depends on it."""
    noises: list[Tensor] = []
    p_moments: list[Moments] = []
    with torch.no_grad():
        code = code_of(vae, rows, OLD_TASK)
        p_mean, p_std = top_of(old, code)
        for stage in old.top_down:
            p_moments.append((p_mean, p_std))
            noises.append(noise_for(p_mean))
            summary = stage(p_mean + noises[-1] * p_std, code)[1]
            if stage is not old.top_down[-1]:
                p_mean, p_std = moments_of(summary)
        p_image = summary.sigmoid()

    q_mean, q_std = top_of(vae, code)
    latent_terms = []
    for stage, noise, (p_mean, p_std) in zip(vae.top_down, noises, p_moments, strict=True):
        squared = (p_mean - q_mean).square().sum() + (p_std - q_std).square().sum()
        latent_terms.append(squared / q_mean[0].numel())
        summary = stage(q_mean + noise * q_std, code)[1]
        if stage is not vae.top_down[-1]:
            q_mean, q_std = moments_of(summary)
    target = (p_image - summary.sigmoid()).square().sum() / (2 * vae.scale**2)
    return target + LATENT_WEIGHT * torch.stack(latent_terms).sum()


def code_of(vae: ConditionalVAE, rows: int, task: int) -> Tensor:
    """The task's code, shape (rows, tasks)."""
    weight = vae.top_prior.weight
    return one_hot(torch.full((rows,), task, device=weight.device), vae.tasks).to(weight.dtype)


def top_of(vae: ConditionalVAE, code: Tensor) -> Moments:
    """Mean and standard deviation of the prior of z5."""
    return moments_of(vae.top_prior(code)[:, :, None, None])


def noise_for(mean: Tensor) -> Tensor:
    """Standard normal noise of a mean's shape."""
    return torch.randn(mean.shape, dtype=mean.dtype, device=mean.device)
