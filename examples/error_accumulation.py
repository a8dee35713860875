"""Do a student's errors grow with the depth of a program?

    python -m examples.error_accumulation                    # three seeds, some minutes each on one core
    python -m examples.error_accumulation --preset smoke     # the same in seconds, too short to learn

Teachers are chains z_1 -> ... -> z_L -> y whose law is given by a formula, of real numbers or of counts (models/chains.py);
students have one small network per layer. For each depth L, students with the same initialisation are distilled for the same steps:

- local: each layer learns on the teacher's states. With one network per layer and Adam without weight decay, the weight of the
  latent terms has no effect, so one line stands for all weights. The squared 2-Wasserstein distance instead of the KL has no effect
  either: between Gaussians with the same standard deviation s, the distance is 2 s^2 times the KL (--learn-scale makes them differ,
  and adds a line).
- surrogate (ours): each layer learns on states that the student makes from the teacher's noise, with several weights lambda. On
  counts no gradient passes from a layer to those before it: every lambda but 0 has the same effect, and with 0 only the last layer
  learns.

The continuous students start once as torch initialises them, and once at the identity, which the teacher's layers are close to.

The measure is KL(teacher || student) of the last state y. It is computed, not estimated: a state depends only on the one before, so
the law of y is a product of transition matrices, on a fine grid for real numbers and on all states for counts. If the student's
probability rounds to 0, the smallest number replaces it, so that a large KL, which comes from the tails, is a lower bound. The tables
also show both upper bounds that distillation minimises: the surrogate loss alone, and the local loss.

Written to ``--out``: results.json, error_accumulation.png (KL against L; mean and standard error over seeds).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from examples._experiment import Experiment, Place, Settings, run
from examples._methods import LOCAL, SURROGATE, explain
from examples._pictures import save, subplots
from examples._tables import Run, Table, estimates
from examples._training import distil, paper_loss
from models.chains import BinomialChain, BinomialStudent, Chain, NormalChain, NormalStudent
from pyro_kd import LocalKD, freeze
from pyro_kd.divergences import reverse_kl, wasserstein2
from pyro_kd.losses import DistillationLoss
from pyro_kd.metrics import Estimate, count_kl, density_ratio_kl, histogram_kl

TARGETS = ["y"]
LAMBDA = {"lambda": "multiplies the latent terms"}
FAMILIES = ("continuous", "continuous, from the identity", "binomial")
MEASURES = {
    "kl": "KL(teacher || student) of y, nats",
    "ratio": "The same by density-ratio estimation from samples",
    "counted": "The same by counting samples",
    "surrogate": "Surrogate bound on it (latent weight 0)",
    "local": "Local bound on it",
}


@dataclass(frozen=True)
class ErrorAccumulationSettings(Settings):
    """The settings; the defaults are the cpu preset.

    Attributes:
        normal_layers, binomial_layers: depths.
        scale: standard deviation of the continuous chains; the paper's 0.01 is taken as the variance.
        learn_scale: whether the students learn it.
        width: of the students' networks.
        grid, reach: points of the grid for real numbers, from -reach to reach.
        sample_rows: draws for each bound and each estimate.
    """

    normal_layers: tuple[int, ...] = (1, 2, 3, 5, 7, 10, 15, 20)
    binomial_layers: tuple[int, ...] = (1, 2, 3, 5, 10)
    scale: float = 0.1
    learn_scale: bool = False
    power: float = 1.1
    count: int = 1000
    count_power: float = 1.2
    width: int = 4
    steps: int = 800
    rows: int = 256
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    grid: int = 1601
    reach: float = 40.0
    sample_rows: int = 10_000


PRESETS = {
    "smoke": ErrorAccumulationSettings(
        normal_layers=(1, 3), binomial_layers=(1, 2), count=100, steps=15, grid=1001, sample_rows=200
    ),
    "cpu": ErrorAccumulationSettings(),
    "paper": ErrorAccumulationSettings(
        binomial_layers=(1, 2, 3, 5, 7, 10, 15, 20), steps=10_000, rows=1024, weight_decay=1e-4, sample_rows=100_000
    ),
}


@dataclass(frozen=True)
class Family:
    """A teacher, its students, and how they are distilled.

    Attributes:
        layers: the depths.
        teacher, student: make a program with so many layers.
        losses: by name.
        law: the law of y as probabilities, see :func:`normal_law` and :func:`binomial_law`.
        counted: estimate of the KL by counting samples.
    """

    layers: tuple[int, ...]
    teacher: Callable[[int], Chain]
    student: Callable[[int], Chain]
    losses: Mapping[str, Callable[[], DistillationLoss]]
    law: Callable[[Any], Tensor]
    counted: Callable[[Tensor, Tensor], Estimate]


def families(settings: ErrorAccumulationSettings) -> dict[str, Family]:
    """The three pairs of teacher and students, by name."""
    surrogate = functools.partial(paper_loss, TARGETS)
    normal_losses = {
        LOCAL: lambda: LocalKD(TARGETS),
        f"{SURROGATE}, lambda 1": lambda: surrogate(latent_weight=1.0),
        f"{SURROGATE}, lambda 0.1": lambda: surrogate(latent_weight=0.1),
        f"{SURROGATE}, lambda 0": lambda: surrogate(latent_weight=0.0),
    }
    if settings.learn_scale:
        normal_losses[f"{LOCAL}, W2"] = lambda: LocalKD(TARGETS, latent_divergence=wasserstein2)
    binomial_losses = {
        LOCAL: lambda: LocalKD(TARGETS),
        f"{LOCAL}, reverse KL": lambda: LocalKD(TARGETS, divergence=reverse_kl, latent_divergence=reverse_kl),
        f"{SURROGATE}, lambda 1": lambda: surrogate(latent_weight=1.0),
        f"{SURROGATE}, lambda 0": lambda: surrogate(latent_weight=0.0),
    }

    def normal(identity: bool) -> Family:
        return Family(
            settings.normal_layers,
            lambda layers: NormalChain(layers, settings.power, settings.scale),
            lambda layers: NormalStudent(
                layers, settings.width, settings.scale, learn_scale=settings.learn_scale, identity=identity
            ),
            normal_losses,
            functools.partial(normal_law, points=settings.grid, reach=settings.reach),
            functools.partial(histogram_kl, bins=100, range=(-3.0, 3.0)),
        )

    binomial = Family(
        settings.binomial_layers,
        lambda layers: BinomialChain(layers, settings.count, settings.count_power),
        lambda layers: BinomialStudent(layers, settings.count, settings.width),
        binomial_losses,
        binomial_law,
        count_kl,
    )
    return {"continuous": normal(False), "continuous, from the identity": normal(True), "binomial": binomial}


def quadrature(low: float, high: float, points: int = 400) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes on an interval, and weights that add up to 1: the mean of a smooth function on it.

    Returns:
        Nodes and weights, both of shape (points,).
    """
    nodes, weights = (torch.tensor(part) for part in np.polynomial.legendre.leggauss(points))
    return low + (high - low) * (nodes + 1) / 2, weights / 2


@torch.no_grad()
def normal_law(chain: NormalChain | NormalStudent, points: int = 1601, reach: float = 40.0) -> Tensor:
    """Probabilities of y at the points of a grid from -reach to reach: density times spacing, shape (points,)."""
    grid = torch.linspace(-reach, reach, points, dtype=torch.float64)
    spacing = 2 * reach / (points - 1)
    states, law = quadrature(-1.0, 1.0)
    for layer in range(chain.layers):
        density = chain.double().transition(layer, states.unsqueeze(-1)).log_prob(grid).exp()
        states, law = grid, law @ density * spacing
    chain.float()
    return law


@torch.no_grad()
def binomial_law(chain: BinomialChain | BinomialStudent) -> Tensor:
    """Probabilities of y = 0, 1, ..., count, shape (count + 1,)."""
    count = float(chain.count)
    values = torch.arange(chain.count + 1, dtype=torch.float64)
    ways = (
        torch.lgamma(torch.tensor(count + 1, dtype=torch.float64))
        - torch.lgamma(values + 1)
        - torch.lgamma(count - values + 1)
    )
    states, law = quadrature(0.0, count)
    for layer in range(chain.layers):
        logits = chain.double().transition(layer, states).logits.unsqueeze(-1)
        successes = torch.where(values > 0, values * logsigmoid(logits), 0.0)
        failures = torch.where(values < count, (count - values) * logsigmoid(-logits), 0.0)
        states, law = values, law @ (ways + successes + failures).exp()
    chain.float()
    return law


def kl_of_laws(p: Tensor, q: Tensor) -> float:
    """KL of two tables of probabilities of shape (states,); a probability in q that rounds to 0 becomes the smallest number."""
    return float((torch.xlogy(p, p) - p * q.clamp_min(1e-300).log()).sum())


def run_depth(family: Family, layers: int, seed: int, settings: ErrorAccumulationSettings) -> dict[str, dict[str, float]]:
    """Distil and measure the students of one depth: figures by method."""
    pyro.set_rng_seed(seed)
    start = family.student(layers).state_dict()
    exact = family.law(family.teacher(layers))
    measured = {}
    for name, loss in family.losses.items():
        pyro.set_rng_seed(seed)
        teacher, student = freeze(family.teacher(layers).model), family.student(layers)
        student.load_state_dict(start)
        distil(
            student.model,
            teacher,
            loss(),
            settings.rows,
            weight=1 / settings.rows,
            steps=settings.steps,
            settings=settings,
            label=f"seed {seed}, {layers} layers: {name}",
        )
        student.cpu()
        teacher.to("cpu")
        rows = settings.sample_rows
        with torch.no_grad():
            samples = teacher(rows), student.model(rows)
        measured[name] = {
            "kl": kl_of_laws(exact, family.law(student)),
            "ratio": density_ratio_kl(*samples).mean,
            "counted": family.counted(*samples).mean,
            "surrogate": paper_loss(TARGETS, latent_weight=0.0).loss(student.model, teacher, rows) / rows,
            "local": LocalKD(TARGETS).loss(student.model, teacher, rows) / rows,
        }
    return measured


def run_seed(seed: int, settings: ErrorAccumulationSettings, place: Place) -> Run:
    """All families at all depths; no teacher is trained. A figure is named by its measure and depth, such as "kl 5"."""
    result: Run = {}
    for title, family in families(settings).items():
        depths = {layers: run_depth(family, layers, seed, settings) for layers in family.layers}
        result[title] = {
            "layers": family.layers,
            "models": {
                name: {f"{key} {layers}": value for layers, found in depths.items() for key, value in found[name].items()}
                for name in family.losses
            },
        }
    return result


def tables(runs: list[Run]) -> dict[str, Table]:
    """One table per family and measure."""
    made = {}
    for title in FAMILIES:
        layers = runs[0][title]["layers"]
        for key, measure in MEASURES.items():
            rows = estimates([run[title] for run in runs], [f"{key} {depth}" for depth in layers])
            columns = [f"L = {depth}" for depth in layers]
            made[f"{title}: {key}"] = Table(f"Chain: {title}. {measure}", columns, rows, explain(rows, LAMBDA))
    return made


COLOURS = {
    LOCAL: "tab:blue",
    f"{SURROGATE}, lambda 1": "tab:red",
    f"{SURROGATE}, lambda 0.1": "tab:orange",
    f"{SURROGATE}, lambda 0": "tab:olive",
}


def draw(runs: list[Run], out: Path) -> None:
    """Draw KL against depth, one line per method: the mean over seeds, with a band of its standard error."""
    figure, axes = subplots(1, len(FAMILIES), figsize=(13, 4.4), sharey=True)
    for ax, title in zip(axes, FAMILIES, strict=True):
        layers = runs[0][title]["layers"]
        rows = estimates([run[title] for run in runs], [f"kl {depth}" for depth in layers])
        for name, row in rows.items():
            mean = np.array([estimate.mean for estimate in row])
            error = np.nan_to_num([estimate.standard_error for estimate in row])
            colour, style = COLOURS.get(name, "tab:cyan"), "--" if name.startswith(LOCAL) else "-"
            ax.plot(layers, mean, style, marker="o", markersize=4, color=colour, label=name)
            low = np.maximum(mean - error, mean / 3)  # on a log axis
            ax.fill_between(layers, low, mean + error, color=colour, alpha=0.15, linewidth=0)
        ax.set_yscale("log")
        ax.set_xticks(layers)
        ax.set_xlabel("layers L")
        ax.grid(axis="y", color="0.92")
        ax.set_title(title)
        ax.legend(fontsize=9, loc="upper left")
    axes[0].set_ylabel("KL(teacher || student) of y, nats")
    save(figure, out / "error_accumulation.png", explain([LOCAL, SURROGATE], LAMBDA))


EXPERIMENT = Experiment("error_accumulation", __doc__ or "", PRESETS, run_seed, tables, draw)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
