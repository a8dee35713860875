"""Time of one distillation step of the Helmholtz machine: the library against a loop written by hand.

    python -m tests.benchmarks.helmholtz_step

All run the same model, loss, batch and optimiser in one process, alternating in blocks of steps; printed are medians of
the blocks, and the median ratio of neighbouring blocks. There are two loops by hand: one with torch's distribution
objects and ``kl_divergence``, and one with bare formulas, the fastest that eager PyTorch allows for this one model.
``tests/test_cost.py`` holds both losses against the library's on the same noise.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn.functional import softplus

from models.helmholtz import HelmholtzMachine
from pyro_kd import SurrogateKD, freeze

ROWS = 272


def draw_noise(rows: int, latents: int = 2) -> dict[str, Tensor]:
    """Uniform noise for the latents, standard normal noise for the targets."""
    noise = {name: torch.rand(rows, latents) for name in ("z4", "z3", "z2", "z1")}
    return noise | {name: torch.randn(rows) for name in ("y2", "y1")}


def loss_by_distributions(
    teacher: nn.ModuleDict, student: nn.ModuleDict, noise: dict[str, Tensor], scale: float = 0.5
) -> Tensor:
    """The surrogate loss with latent weight 1, for this one model, with torch's distributions."""

    def run(net: nn.ModuleDict, y: dict[str, Tensor]) -> dict[str, Bernoulli | Normal]:
        sites: dict[str, Bernoulli | Normal] = {}

        def latent(name: str, logits: Tensor) -> Tensor:
            sites[name] = Bernoulli(logits=logits)
            return (noise[name] < sites[name].probs).float()

        def target(name: str, mean: Tensor) -> Tensor:
            sites[name] = Normal(mean.squeeze(-1), scale)
            return y.setdefault(name, sites[name].mean + scale * noise[name]).unsqueeze(-1)

        z4 = latent("z4", net.z4.expand(noise["z4"].shape))
        y2 = target("y2", net["y2"](latent("z3", net["z3"](z4))))
        z2 = latent("z2", net["z2"](y2))
        target("y1", net["y1"](latent("z1", net["z1"](z2))))
        return sites

    y: dict[str, Tensor] = {}
    with torch.no_grad():
        p = run(teacher, y)
    q = run(student, y)
    return torch.stack([kl_divergence(p[name], q[name]).sum() for name in p]).sum()


def loss_by_formulas(teacher: nn.ModuleDict, student: nn.ModuleDict, noise: dict[str, Tensor], scale: float = 0.5) -> Tensor:
    """The same with bare formulas."""

    def run(net: nn.ModuleDict, y: dict[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}

        def latent(name: str, logits: Tensor) -> Tensor:
            out[name] = logits
            return (noise[name] < logits.sigmoid()).float()

        def target(name: str, mean: Tensor) -> Tensor:
            out[name] = mean.squeeze(-1)
            return y.setdefault(name, out[name] + scale * noise[name]).unsqueeze(-1)

        z4 = latent("z4", net.z4.expand(noise["z4"].shape))
        y2 = target("y2", net["y2"](latent("z3", net["z3"](z4))))
        z2 = latent("z2", net["z2"](y2))
        target("y1", net["y1"](latent("z1", net["z1"](z2))))
        return out

    y: dict[str, Tensor] = {}
    with torch.no_grad():
        p = run(teacher, y)
    q = run(student, y)
    terms = [
        (p[name].sigmoid() * (p[name] - q[name]) + softplus(q[name]) - softplus(p[name])).sum()
        if name.startswith("z")
        else (p[name] - q[name]).square().sum() / (2 * scale**2)
        for name in p
    ]
    return torch.stack(terms).sum()


def make_steps() -> dict[str, Callable[[], None]]:
    """One step of each loop, from equal parameters."""
    torch.manual_seed(0)
    teacher = HelmholtzMachine(width=8)
    frozen = freeze(teacher.model)
    start = HelmholtzMachine(width=2)
    loss = SurrogateKD(targets=["y1", "y2"], latent_weight=1.0)

    def stepper(make_loss: Callable[[HelmholtzMachine], Callable[[], Tensor]]) -> Callable[[], None]:
        student = copy.deepcopy(start)
        optim = torch.optim.Adam(student.generative.parameters(), lr=1e-2)
        compute = make_loss(student)

        def step() -> None:
            optim.zero_grad()
            compute().backward()
            optim.step()

        return step

    def by_library(student: HelmholtzMachine) -> Callable[[], Tensor]:
        module = loss(student.model, frozen)
        return lambda: module(ROWS)

    return {
        "library": stepper(by_library),
        "by hand, distributions": stepper(
            lambda student: lambda: loss_by_distributions(teacher.generative, student.generative, draw_noise(ROWS))
        ),
        "by hand, formulas": stepper(
            lambda student: lambda: loss_by_formulas(teacher.generative, student.generative, draw_noise(ROWS))
        ),
    }


def measure(blocks: int = 30, steps: int = 20) -> dict[str, tuple[float, float]]:
    """For each loop: its median seconds a step, and the library's time relative to it."""
    pyro.clear_param_store()
    loops = make_steps()
    times: dict[str, list[float]] = {name: [] for name in loops}
    for block in range(blocks + 2):
        for name, step in loops.items():
            start = time.perf_counter()
            for _ in range(steps):
                step()
            if block >= 2:  # the first two warm up
                times[name].append((time.perf_counter() - start) / steps)
    return {
        name: (statistics.median(column), statistics.median(a / b for a, b in zip(times["library"], column, strict=True)))
        for name, column in times.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20, help="steps a block")
    options = parser.parse_args()
    for name, (seconds, ratio) in measure(options.blocks, options.steps).items():
        print(f"{name:24s} {1e3 * seconds:6.2f} ms a step; library / this {ratio:5.2f}")
