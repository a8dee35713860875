"""The hierarchical VAE, width 128 to width 32: squared W2 at the latents, its mean over a layer with weight 0.1, and KL at the image."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.hierarchical_vae import HierarchicalVAE, Moments, moments_of
from pyro_kd import freeze
from pyro_kd.divergences import wasserstein2
from tests.benchmarks.applications.application import Application
from tests.support.losses import SurrogateKD

__all__ = ["build", "loss_by_hand"]

LATENT_WEIGHT = 0.1


def build(
    rows: int = 128,
    *,
    teacher_width: int = 128,
    student_width: int = 32,
    latents: int = 16,
    size: int = 32,
    device: str = "cpu",
    memory_format: torch.memory_format = torch.preserve_format,
) -> Application:
    """The paper's sizes for images of 32 pixels."""
    teacher = HierarchicalVAE(size, teacher_width, latents=latents).to(device, memory_format=memory_format).eval()
    student = HierarchicalVAE(size, student_width, latents=latents).to(device, memory_format=memory_format)
    frozen = freeze(teacher.model)

    def library(captured: bool, **options: Any) -> Callable[[], Tensor]:
        loss = SurrogateKD(["x"], latent_weight=LATENT_WEIGHT, latent_divergence=wasserstein2, latent_reduction="mean")(
            student.model, frozen
        )
        if captured:
            loss.compile(**options)
        return lambda: loss(rows) / rows

    return Application(
        name="hierarchical_vae",
        sizes=f"width {teacher_width} -> {student_width}, {size} pixels, {rows} rows",
        student=student.top_down,
        library=library(False),
        by_hand=lambda: loss_by_hand(student, teacher, rows),
        captured=lambda **options: library(True, **options),
        model=student.model,
        guide=student.guide,
        args=(rows, torch.rand(rows, student.channels, size, size, device=device)),
        learning_rate=1e-4,
    )


def loss_by_hand(student: HierarchicalVAE, teacher: HierarchicalVAE, rows: int) -> Tensor:
    """The loss a row. The prior of z5 is the same in both, and x is not drawn, since nothing depends on it."""
    weight = next(student.top_down.parameters())

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, dtype=weight.dtype, device=weight.device)

    noises = [draw((rows, student.latents, 1, 1))]
    p_moments: list[Moments] = []
    top, *stages = teacher.top_down
    with torch.no_grad():
        summary = top(noises[0])[1]
        for stage in stages:
            p_mean, p_std = moments_of(summary)
            p_moments.append((p_mean, p_std))
            noises.append(draw(p_mean.shape))
            summary = stage(p_mean + noises[-1] * p_std)[1]
        p_image = summary.sigmoid()

    top, *stages = student.top_down
    summary = top(noises[0])[1]
    latent_terms = []
    for stage, noise, (p_mean, p_std) in zip(stages, noises[1:], p_moments, strict=True):
        q_mean, q_std = moments_of(summary)
        squared = (p_mean - q_mean).square().sum() + (p_std - q_std).square().sum()
        latent_terms.append(squared / q_mean[0].numel())
        summary = stage(q_mean + noise * q_std)[1]
    target = (p_image - summary.sigmoid()).square().sum() / (2 * student.scale**2)
    return (target + LATENT_WEIGHT * torch.stack(latent_terms).sum()) / rows
