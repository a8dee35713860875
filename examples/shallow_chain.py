"""Can a chain of few layers replace one of many?

    python -m examples.shallow_chain                    # three seeds, some minutes each on one core
    python -m examples.shallow_chain --preset smoke     # the same in seconds, too short to learn

A chain of 20 transitions (models/chains.py) is distilled into one of 5, each of which replaces four. The student's states are paired
with the teacher's z_1, z_5, z_9, z_13 and z_17, so that they mean the same. The noise of the states between them is treated in two
ways:

- last noise: it is the teacher's alone (``fresh``). A transition of the student has the noise of the last of four states, and what
  the other noise does becomes a part of its scale, which is learned;
- all noise: it is an input of the student's networks. The student has a standard normal latent for each of the states between, which
  shares the noise of that state (``site_map``) and has weight 0.

K samples are local distillation for half of the steps, and then the bound of 64 samples on the law of y, MultiSampleKD.

All students start at the identity, which four transitions of the teacher are closer to than random networks.

The measures are the KL of y and the total variation, which is half the absolute difference of the two laws, from 0 to 1. Both are
computed, not estimated. The teacher is unstable beyond 1, so y has long tails (2 % of it beyond 3), which decide most of a large KL
and little of the total variation. Scratch is maximum likelihood on draws of y, with the exact density of the student: it shows what
five layers can reach. The bounds are those of the pairing: with last noise, they contain what the fresh noise decides, and cannot be
0.

Written to ``--out``: results.json.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.nn.functional import conv1d

from examples._chain_laws import kl_of_laws, quadrature
from examples._experiment import Experiment, Place, Settings, run
from examples._methods import FORCED, LOCAL, MULTI_SAMPLE, SCRATCH, SURROGATE, explain
from examples._tables import Run, Table, estimates
from examples._training import distil, paper_loss
from models.chains import BlockStudent, NormalChain, NormalStudent
from pyro_kd import LocalKD, MultiSampleKD, SurrogateKD, freeze
from pyro_kd.losses import DistillationLoss

LAST, ALL = "last noise", "all noise"
MEANINGS = {
    LAST: "a transition has the noise of the last of the teacher's states that it replaces",
    ALL: "a transition has the noise of all of them",
    "lambda": "multiplies the latent terms",
}
MEASURES = {
    "kl": "KL(teacher || student)",
    "variation": "total variation",
    "surrogate": "surrogate bound",
    "local": "local bound",
}


@dataclass(frozen=True)
class ShallowChainSettings(Settings):
    """The settings; the defaults are the cpu preset.

    Attributes:
        layers, student_layers: transitions of the teacher, and of the students: a divisor of them.
        width: of the students' networks.
        samples: number K of samples of the bound.
        draws: draws of y that a student learns from without a teacher.
        bound_rows: draws for each bound.
        grid: points of the grid on which the law of y is computed.
    """

    layers: int = 20
    student_layers: int = 5
    width: int = 8
    steps: int = 2000
    rows: int = 256
    learning_rate: float = 1e-2
    samples: int = 64
    draws: int = 10_000
    bound_rows: int = 10_000
    grid: int = 8001


PRESETS = {
    "smoke": ShallowChainSettings(layers=4, student_layers=2, steps=15, samples=4, draws=500, bound_rows=500, grid=2001),
    "cpu": ShallowChainSettings(),
    "paper": ShallowChainSettings(steps=10_000, rows=1024, bound_rows=100_000),
}


@dataclass(frozen=True)
class Students:
    """Students of one kind.

    Attributes:
        new: makes one with new weights.
        options: of a loss: ``site_map`` and ``fresh``.
        latent_weight: the weight of a latent, given lambda and the teacher's name of the site.
    """

    new: Callable[[], NormalStudent]
    options: Mapping[str, Any]
    latent_weight: Callable[[float, str], float] = lambda weight, site: weight

    def loss(self, kind: Callable[..., DistillationLoss], weight: float) -> DistillationLoss:
        """The loss with this lambda."""
        return kind(["y"], latent_weight=partial(self.latent_weight, weight), **self.options)


def students_of(settings: ShallowChainSettings) -> dict[str, Students]:
    """Both kinds of students, by name."""
    layers, short, width = settings.layers, settings.student_layers, settings.width
    if layers % short or layers == short:
        raise ValueError(f"the student's {short} transitions must be a divisor of the teacher's {layers}")
    block = layers // short
    between = [f"z_{k + 1}" for k in range(layers) if k % block]
    states = {f"z_{k + 1}": f"z_{k * block + 1}" for k in range(short)}
    noise = {name.replace("z", "noise"): name for name in between}
    return {
        LAST: Students(
            partial(NormalStudent, short, width, learn_scale=True, identity=True), {"site_map": states, "fresh": between}
        ),
        ALL: Students(
            partial(BlockStudent, short, block, width, identity=True),
            {"site_map": noise},
            lambda weight, site: 0.0 if site in between else weight,
        ),
    }


@torch.no_grad()
def law_of(chain: NormalChain | NormalStudent, points: int = 8001, reach: float = 40.0, nodes: int = 8) -> Tensor:
    """Probabilities of y at the points of a grid from -reach to reach, shape (points,).

    The means of a transition are collected on the grid, and the result is folded with its normal noise, so that the grid can be fine.
    The noise inputs of a :class:`~models.chains.BlockStudent` are summed out by Gauss-Hermite quadrature with ``nodes`` points each.
    """
    grid, spacing = torch.linspace(-reach, reach, points, dtype=torch.float64), 2 * reach / (points - 1)
    inputs, shares = _standard_normals(chain.block - 1, nodes) if isinstance(chain, BlockStudent) else (None, None)
    states, law = quadrature(-1.0, 1.0)
    for layer in range(chain.layers):
        if inputs is None:
            fn, mass = chain.double().transition(layer, states), law
        else:
            wide = states.unsqueeze(-1).expand(-1, len(inputs))
            fn = chain.double().transition(layer, wide, inputs.expand(len(states), -1, -1))
            mass = law.unsqueeze(-1) * shares
        place = ((fn.mean + reach) / spacing).clamp(0, points - 1.001).flatten()
        below = place.long()
        collected = torch.zeros_like(grid)
        collected.index_add_(0, below, mass.flatten() * (1 - place + below))
        collected.index_add_(0, below + 1, mass.flatten() * (place - below))
        scale = float(fn.stddev.flatten()[0])
        width = min(round(38 * scale / spacing), points // 2)
        kernel = (-0.5 * (torch.arange(-width, width + 1) * spacing / scale).double().square()).exp()
        states, law = grid, conv1d(collected[None, None], (kernel / kernel.sum())[None, None], padding=width).flatten()
    chain.float()
    return law


def _standard_normals(number: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Points of shape (nodes ** number, number) and weights of shape (nodes ** number,) for independent standard normals."""
    points, weights = (torch.tensor(part) for part in np.polynomial.hermite_e.hermegauss(nodes))
    grid = torch.cartesian_prod(*[points] * number).reshape(-1, number)
    share = torch.cartesian_prod(*[weights / weights.sum()] * number).reshape(-1, number).prod(-1)
    return grid, share


def log_density(chain: NormalStudent, y: Tensor, points: int = 241, reach: float = 3.0) -> Tensor:
    """The log density of y under a short chain, of the shape of ``y``, which is (rows,); differentiable.

    The states between are summed out on a grid. It is coarse: the spacing is a quarter of the smallest scale.
    """
    grid, spacing = torch.linspace(-reach, reach, points), 2 * reach / (points - 1)
    states, law = (part.float() for part in quadrature(-1.0, 1.0, 100))
    for layer in range(chain.layers - 1):
        density = chain.transition(layer, states.unsqueeze(-1)).log_prob(grid).exp()
        states, law = grid, law @ density * spacing
    density = chain.transition(chain.layers - 1, states.unsqueeze(-1)).log_prob(y).exp()
    return (law @ density).clamp_min(1e-30).log()


def fit_to_draws(student: NormalStudent, y: Tensor, settings: ShallowChainSettings) -> None:
    """Maximum likelihood with the exact density: batches of draws ``y``, shape (draws,)."""
    optim = torch.optim.Adam(student.parameters(), lr=settings.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optim, settings.steps)
    for _ in range(settings.steps):
        batch = y[torch.randint(len(y), (settings.rows,))]
        optim.zero_grad()
        (-log_density(student, batch).mean()).backward()
        optim.step()
        scheduler.step()


def run_seed(seed: int, settings: ShallowChainSettings, place: Place) -> Run:
    """Train and measure all students; students of one kind start from the same weights."""
    pyro.set_rng_seed(seed)
    teacher = NormalChain(settings.layers)
    exact, program = law_of(teacher, settings.grid), freeze(teacher.model)
    with torch.no_grad():
        draws = program(settings.draws)
    rows, measured = settings.bound_rows, dict[str, dict[str, float]]()
    for title, students in students_of(settings).items():
        pyro.set_rng_seed(seed)
        start = students.new().state_dict()
        losses: dict[str, DistillationLoss | None] = {SCRATCH: None} if title == LAST else {}
        losses |= {f"{LOCAL}, {title}": students.loss(LocalKD, 1.0)}
        for weight in (1.0, 0.0):
            losses[f"{SURROGATE}, {title}, lambda {weight:g}"] = students.loss(paper_loss, weight)
        losses[f"{FORCED}, {title}"] = students.loss(SurrogateKD, 0.0)
        losses[f"{MULTI_SAMPLE}, {title}"] = students.loss(LocalKD, 1.0)
        mixtures = students.loss(partial(MultiSampleKD, num_samples=settings.samples), 0.0)
        for name, loss in losses.items():
            pyro.set_rng_seed(seed)
            student = students.new()
            student.load_state_dict(start)
            if loss is None:
                fit_to_draws(student, draws, settings)
            else:
                one = {"weight": 1 / settings.rows, "steps": settings.steps, "label": f"seed {seed}: {name}"}
                if name.startswith(MULTI_SAMPLE):  # local for the first half
                    one |= {"then": mixtures, "then_from": max(settings.steps // 2, 1)}
                distil(student.model, program, loss, settings.rows, settings=settings, **one)
            bounds = {"surrogate": students.loss(paper_loss, 0.0), "local": students.loss(LocalKD, 1.0)}
            law = law_of(student, settings.grid)
            measured[name] = {"kl": kl_of_laws(exact, law), "variation": float((exact - law).abs().sum()) / 2}
            for key, bound in bounds.items():
                measured[name][key] = bound.loss(student.model, program, rows) / rows
    return {"models": measured}


def tables(runs: list[Run]) -> dict[str, Table]:
    """The KL and the bounds of all students."""
    rows, title = estimates(runs, list(MEASURES)), "A chain into a shorter one: the last state y, nats"
    return {"chain": Table(title, list(MEASURES.values()), rows, explain(rows, MEANINGS))}


EXPERIMENT = Experiment("shallow_chain", __doc__ or "", PRESETS, run_seed, tables)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
