"""The VRNN, MLPs 2x512 + LSTM 1200 to 2x128 + LSTM 600, over 628 points: KL everywhere, that of the latents with weight 1e-3.

Terms are summed over the points and dimensions of a drawing, and divided by rows and points.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from models.vrnn import VRNN
from pyro_kd import freeze
from tests.benchmarks.applications.application import Application
from tests.support.losses import SurrogateKD

__all__ = ["build", "loss_by_hand"]

LATENT_WEIGHT = 1e-3


def build(
    rows: int = 32,
    length: int = 628,
    *,
    teacher_width: int = 512,
    teacher_recurrent: int = 1200,
    student_width: int = 128,
    student_recurrent: int = 600,
    device: str = "cpu",
) -> Application:
    """The paper's sizes."""
    teacher = VRNN(teacher_width, teacher_recurrent).to(device).eval()
    student = VRNN(student_width, student_recurrent).to(device)
    targets = [f"{kind}{t}" for t in range(1, length + 1) for kind in ("pen", "move")]
    frozen = freeze(teacher.model)

    def library(captured: bool, **options: Any) -> Callable[[], Tensor]:
        loss = SurrogateKD(targets, latent_weight=LATENT_WEIGHT)(student.model, frozen)
        if captured:
            loss.compile(**options)
        return lambda: loss(rows, length) / (rows * length)

    x = torch.randn(rows, length, 3, device=device)
    x[..., 2] = (x[..., 2] > 1.5).to(x.dtype)
    return Application(
        name="vrnn",
        sizes=(
            f"2x{teacher_width} + LSTM {teacher_recurrent} -> 2x{student_width} + LSTM {student_recurrent}, "
            f"{length} points, {rows} rows"
        ),
        student=student.generative,
        library=library(False),
        by_hand=lambda: loss_by_hand(student, teacher, rows, length),
        captured=lambda **options: library(True, **options),
        model=student.model,
        guide=student.guide,
        args=(rows, length, x),
        learning_rate=1e-4,
    )


def loss_by_hand(student: VRNN, teacher: VRNN, rows: int, length: int) -> Tensor:
    """The loss a row and point: both networks go through the points side by side; divergences of all points at once.

    Step by step as the model is written. The student's decoder and its features of the points need no loop: out of it, on all points at
    once, they would spare about a fifth of the step on a CPU.
    """
    p_net, q_net, scale = teacher.generative, student.generative, student.scale
    weight = next(q_net.parameters())

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, dtype=weight.dtype, device=weight.device)

    p_hidden = p_cell = weight.new_zeros(rows, teacher.recurrent)
    q_hidden = q_cell = weight.new_zeros(rows, student.recurrent)
    p_priors, q_priors, p_outputs, q_outputs = [], [], [], []
    for t in range(1, length + 1):
        with torch.no_grad():
            p_prior = p_net["prior"](p_hidden)
            p_loc, p_log_variance = p_prior.chunk(2, -1)
            noise = draw(p_loc.shape)
            p_features = p_net["latents"](p_loc + noise * (p_log_variance / 2).exp())
            p_output = p_net["decoder"](torch.cat([p_features, p_hidden], -1))
        q_prior = q_net["prior"](q_hidden)
        q_loc, q_log_variance = q_prior.chunk(2, -1)
        q_features = q_net["latents"](q_loc + noise * (q_log_variance / 2).exp())
        q_output = q_net["decoder"](torch.cat([q_features, q_hidden], -1))
        if t < length:
            with torch.no_grad():
                pen = torch.bernoulli(p_output[:, 0].sigmoid())
                move = p_output[:, 1:] + scale * draw((rows, 2))
                point = torch.cat([move, pen.unsqueeze(-1)], -1)
                p_inputs = torch.cat([p_net["points"](point), p_features], -1)
                p_hidden, p_cell = p_net["cell"](p_inputs, (p_hidden, p_cell))
            q_inputs = torch.cat([q_net["points"](point), q_features], -1)
            q_hidden, q_cell = q_net["cell"](q_inputs, (q_hidden, q_cell))
        p_priors.append(p_prior)
        q_priors.append(q_prior)
        p_outputs.append(p_output)
        q_outputs.append(q_output)

    (p_loc, p_log_variance), (q_loc, q_log_variance) = (torch.stack(x).chunk(2, -1) for x in (p_priors, q_priors))
    difference = p_log_variance - q_log_variance
    squared = (p_loc - q_loc).square() * (-q_log_variance).exp()
    latent_kl = 0.5 * (difference.exp() + squared - 1 - difference).sum()
    p, q = torch.stack(p_outputs), torch.stack(q_outputs)
    p_logits, q_logits = p[..., 0], q[..., 0]
    pen_kl = (p_logits.sigmoid() * (p_logits - q_logits) + softplus(q_logits) - softplus(p_logits)).sum()
    move_kl = (p[..., 1:] - q[..., 1:]).square().sum() / (2 * scale**2)
    return (pen_kl + move_kl + LATENT_WEIGHT * latent_kl) / (rows * length)
