"""The Helmholtz machine, width 8 to width 2: KL at the binary latents with weight 1, KL at the two Gaussian targets."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn.functional import softplus

from models.helmholtz import HelmholtzMachine
from pyro_kd import freeze
from tests.benchmarks.applications.application import Application
from tests.support.losses import SurrogateKD

__all__ = ["build", "loss_by_formulas", "loss_by_hand", "loss_by_traces"]

SITES = ("z4", "z3", "y2", "z2", "z1", "y1")


def build(rows: int = 272, *, device: str = "cpu") -> Application:
    """The paper's sizes: all 272 rows of Old Faithful in a batch."""
    teacher = HelmholtzMachine(width=8).to(device)
    student = HelmholtzMachine(width=2).to(device)
    frozen = freeze(teacher.model)

    def library(captured: bool, **options: Any) -> Callable[[], Tensor]:
        loss = SurrogateKD(targets=["y1", "y2"], latent_weight=1.0)(student.model, frozen)
        if captured:
            loss.compile(**options)
        return lambda: loss(rows) / rows

    return Application(
        name="helmholtz",
        sizes=f"width 8 -> 2, {rows} rows",
        student=student.generative,
        library=library(False),
        by_hand=lambda: loss_by_hand(student, teacher, rows),
        by_formulas=lambda: loss_by_formulas(student, teacher, rows),
        by_traces=lambda: loss_by_traces(student, teacher, rows),
        captured=lambda **options: library(True, **options),
        model=student.model,
        guide=student.guide,
        args=(rows, torch.randn(rows, device=device), torch.randn(rows, device=device)),
        learning_rate=1e-2,
    )


def loss_by_hand(student: HelmholtzMachine, teacher: HelmholtzMachine, rows: int) -> Tensor:
    """The loss a row, with torch's distributions and their KL."""
    start = student.generative.get_parameter("z4")
    shape, device, dtype = (rows, len(start)), start.device, start.dtype

    def uniform() -> Tensor:
        return torch.rand(shape, device=device, dtype=torch.float64)

    u4, u3, e2, u2, u1 = uniform(), uniform(), torch.randn(rows, device=device, dtype=dtype), uniform(), uniform()

    def run(machine: HelmholtzMachine, y2: Tensor | None) -> tuple[list[Bernoulli | Normal], Tensor]:
        net, sites = machine.generative, list[Bernoulli | Normal]()

        def latent(noise: Tensor, logits: Tensor) -> Tensor:
            sites.append(Bernoulli(logits=logits))
            return (noise < sites[-1].probs).to(dtype)

        def target(mean: Tensor) -> Normal:
            sites.append(normal := Normal(mean.squeeze(-1), machine.scale))
            return normal

        normal = target(net["y2"](latent(u3, net["z3"](latent(u4, net.get_parameter("z4").expand(shape))))))
        y2 = normal.mean + machine.scale * e2 if y2 is None else y2
        z2 = latent(u2, net["z2"](y2.unsqueeze(-1)))
        target(net["y1"](latent(u1, net["z1"](z2))))
        return sites, y2

    with torch.no_grad():
        p_sites, y2 = run(teacher, None)
    q_sites, _ = run(student, y2)
    return torch.stack([kl_divergence(p, q).sum() for p, q in zip(p_sites, q_sites, strict=True)]).sum() / rows


def loss_by_formulas(student: HelmholtzMachine, teacher: HelmholtzMachine, rows: int) -> Tensor:
    """The same by bare formulas, all KLs of one kind at once: the fastest that PyTorch allows for this one model."""
    start = student.generative.get_parameter("z4")
    latents, device, dtype, scale = len(start), start.device, start.dtype, student.scale

    def uniform() -> Tensor:
        return torch.rand(rows, latents, device=device, dtype=torch.float64)

    u4, u3, e2, u2, u1 = uniform(), uniform(), torch.randn(rows, device=device, dtype=dtype), uniform(), uniform()

    def run(machine: HelmholtzMachine, y2: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        net = machine.generative

        def flips(noise: Tensor, logits: Tensor) -> Tensor:
            return (noise < logits.detach().sigmoid()).to(dtype)

        logits4 = net.get_parameter("z4").expand(rows, latents)
        logits3 = net["z3"](flips(u4, logits4))
        mean2 = net["y2"](flips(u3, logits3))
        if y2 is None:
            y2 = mean2 + scale * e2.unsqueeze(-1)
        logits2 = net["z2"](y2)
        logits1 = net["z1"](flips(u2, logits2))
        mean1 = net["y1"](flips(u1, logits1))
        return torch.cat([logits4, logits3, logits2, logits1], -1), torch.cat([mean2, mean1], -1), y2

    with torch.no_grad():
        p_logits, p_means, y2 = run(teacher, None)
        p_probs, p_softplus = p_logits.sigmoid(), softplus(p_logits)
    q_logits, q_means, _ = run(student, y2)
    latent_kl = (p_probs * (p_logits - q_logits) + softplus(q_logits) - p_softplus).sum()
    target_kl = (p_means - q_means).square().sum() / (2 * scale**2)
    return (target_kl + latent_kl) / rows


def loss_by_traces(student: HelmholtzMachine, teacher: HelmholtzMachine, rows: int) -> Tensor:
    """The same KLs from one trace of each program by Pyro. Each draws its own latents: not the same loss, but Pyro's own cost."""

    def trace(machine: HelmholtzMachine, **targets: Tensor) -> poutine.Trace:
        with poutine.block(hide_types=["param"]):
            return poutine.trace(poutine.condition(machine.model, targets)).get_trace(rows)

    with pyro.get_param_store().scope(), torch.no_grad():  # pyro.module has one name for both
        taught = trace(teacher)
    learnt = trace(student, **{name: taught.nodes[name]["value"] for name in ("y2", "y1")})
    terms = [kl_divergence(taught.nodes[name]["fn"], learnt.nodes[name]["fn"]).sum() for name in SITES]
    return torch.stack(terms).sum() / rows
