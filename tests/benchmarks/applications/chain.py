"""The real-valued chain of depth 20: KL everywhere, that of the latents with weight 1."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.chains import NormalChain, NormalStudent
from pyro_kd import freeze
from tests.benchmarks.applications.application import Application
from tests.support.losses import SurrogateKD

__all__ = ["build", "loss_by_hand"]


def build(rows: int = 256, *, layers: int = 20, device: str = "cpu") -> Application:
    """The paper's chain, as deep as its deepest."""
    teacher, student = NormalChain(layers).to(device), NormalStudent(layers).to(device)
    frozen = freeze(teacher.model)

    def library(captured: bool, **options: Any) -> Callable[[], Tensor]:
        loss = SurrogateKD(["y"], latent_weight=1.0)(student.model, frozen)
        if captured:
            loss.compile(**options)
        return lambda: loss(rows) / rows

    return Application(
        name="chain",
        sizes=f"{layers} layers, {rows} rows",
        student=student.networks,
        library=library(False),
        by_hand=lambda: loss_by_hand(student, teacher, rows),
        captured=lambda **options: library(True, **options),
        model=student.model,
        guide=lambda *args: None,
        args=(rows, torch.randn(rows, device=device)),
        learning_rate=1e-2,
    )


def loss_by_hand(student: NormalStudent, teacher: NormalChain, rows: int) -> Tensor:
    """The loss a row; z_1 has the same law in both, and y is not drawn, since nothing depends on it. The student's scales are fixed."""
    low, high = student.low, student.high
    start = low + torch.rand(rows, device=low.device, dtype=low.dtype) * (high - low)
    noises, p_means = [], []
    with torch.no_grad():
        z = start
        for layer in range(teacher.layers):
            p_means.append(z.sign() * z.abs() ** teacher.power)
            if layer < teacher.layers - 1:
                noises.append(torch.randn(rows, device=low.device, dtype=low.dtype))
                z = p_means[-1] + noises[-1] * teacher.scale

    scales = student.log_scale.exp()
    z, terms = start, []
    for layer, p_mean in enumerate(p_means):
        q_mean, scale = z + student.networks[layer](z.unsqueeze(-1)).squeeze(-1), scales[layer]
        ratio = teacher.scale / scale
        constant = 0.5 * (ratio.square() - 1) - ratio.log()
        terms.append(((p_mean - q_mean).square() / (2 * scale**2) + constant).sum())
        if layer < teacher.layers - 1:
            z = q_mean + noises[layer] * scale
    return torch.stack(terms).sum() / rows
