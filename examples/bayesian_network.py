"""Distil a discrete Bayesian network into one with small neural conditionals, and measure exactly what was lost.

    python -m examples.bayesian_network                                        # the network that comes with the package
    python -m examples.bayesian_network --data alarm.bif --targets BP,CVP      # a BIF file, and what the student should reproduce
    python -m examples.bayesian_network --merge train_delay --merged-states 2  # the student has 2 states of this node, the teacher 3
    python -m examples.bayesian_network --preset smoke                         # the same in seconds, too short to learn

The teacher is a network of tables. Students have the same nodes, with one perceptron per node in place of its table, of each of
several widths. The targets are the leaves, unless they are named; nodes that are not ancestors of a target are left out. Students
with the same start are distilled for the same steps: by local distillation (local); by surrogate and latent loss (surrogate, ours);
or locally for half of the steps, and then by the bound of K samples (K samples, ours) or by the KL of the targets itself (exact
marginal, ours).

The measure is KL(teacher || student) of the joint law of all targets. It is computed, not estimated: both laws are sums of products
of tables, one node after the other (variable elimination). Upper bounds on it, which distillation minimises, stand beside it.

With --merge, neighbouring states of a node are one state of the student's. The teacher draws the merged state first, and then its own
state given that.

BIF files are read with pgmpy: pip install 'pyro-kd[networks]'. Written to ``--out``: results.json, bayesian_network.png.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import opt_einsum
import pyro
import torch
from torch import Tensor

from examples._experiment import Experiment, Place, Settings, run
from examples._methods import LOCAL, MARGINAL, MULTI_SAMPLE, SURROGATE, TEACHER, explain
from examples._pictures import save, subplots
from examples._tables import Run, Table, estimates
from examples._training import distil, paper_loss
from models.bayesian_network import (
    BayesianNetwork,
    NetworkProgram,
    NeuralBayesianNetwork,
    merged_name,
    merged_parents,
    with_merged_states,
)
from pyro_kd import LocalKD, MarginalKD, MultiSampleKD, freeze
from pyro_kd.datasets import DiscreteNetwork, bif, journey
from pyro_kd.losses import DistillationLoss

LARGEST = 50_000_000  # entries of the largest table that an exact law may need
MEASURES = {
    "kl": "KL(teacher || student) of the joint law of the targets, nats",
    "surrogate": "Surrogate bound on it (latent weight 0)",
    "local": "Local bound on it",
    "seconds": "Seconds of training",
}


@dataclass(frozen=True)
class BayesianNetworkSettings(Settings):
    """The settings; the defaults are the cpu preset.

    Attributes:
        data: a .bif or .bif.gz file; by default the network that comes with the package.
        targets: names of nodes, separated by commas; by default the leaves.
        merge: names of nodes with fewer states in the student, separated by commas.
        merged_states: the number of states that these have in the student.
        widths: hidden units of the students' perceptrons.
        latent_weight: weight lambda of the latent terms of the surrogate loss.
        samples: number K of samples of the bound.
        sample_rows: draws for each bound.
    """

    data: str = ""
    targets: str = ""
    merge: str = ""
    merged_states: int = 2
    widths: tuple[int, ...] = (1, 2, 4)
    latent_weight: float = 1.0
    samples: int = 64
    steps: int = 2000
    rows: int = 256
    learning_rate: float = 1e-2
    sample_rows: int = 20_000


PRESETS = {
    "smoke": BayesianNetworkSettings(widths=(1, 2), samples=4, steps=5, rows=32, sample_rows=200),
    "cpu": BayesianNetworkSettings(),
    "paper": BayesianNetworkSettings(widths=(1, 2, 4, 8), steps=10_000, rows=1024, sample_rows=100_000),
}


@dataclass(frozen=True)
class Task:
    """What is distilled.

    Attributes:
        teacher: the program of tables.
        teacher_parameters: the free numbers of its tables, before any merging.
        parents, sizes: the nodes of the student.
        targets: the nodes that the student should reproduce.
        fresh: the nodes that only the teacher has.
    """

    teacher: BayesianNetwork
    teacher_parameters: int
    parents: Mapping[str, Sequence[str]]
    sizes: Mapping[str, int]
    targets: Sequence[str]
    fresh: Collection[str]


def task(network: DiscreteNetwork, settings: BayesianNetworkSettings) -> Task:
    """The part of a network that matters to the targets, with merged nodes if there are any."""
    targets = names(settings.targets) or network.leaves
    network = network.ancestral(targets)
    merged = names(settings.merge)
    sizes = {name: len(states) for name, states in network.states.items()}
    parents, tables = network.parents, network.tables
    for name in merged:
        if name not in sizes or name in targets:
            raise SystemExit(f"--merge {name}: it must be an ancestor of the targets {', '.join(targets)}, and no target")
        if not 1 <= settings.merged_states <= sizes[name]:
            raise SystemExit(f"--merged-states {settings.merged_states}: {name} has {sizes[name]} states")
        groups = torch.arange(sizes[name]) * settings.merged_states // sizes[name]
        parents, tables = with_merged_states(parents, tables, name, groups)
        sizes[merged_name(name)] = settings.merged_states
    student = merged_parents(network.parents, merged)
    teacher, own_sizes = BayesianNetwork(parents, tables), {name: sizes[name] for name in student}
    return Task(teacher, network.num_parameters, student, own_sizes, targets, merged)


def names(text: str) -> tuple[str, ...]:
    """The names in a list that is separated by commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def methods(case: Task, settings: BayesianNetworkSettings) -> dict[str, Callable[[], DistillationLoss]]:
    """The losses that are compared, by name."""
    return {
        LOCAL: lambda: LocalKD(case.targets, fresh=case.fresh),
        SURROGATE: lambda: paper_loss(case.targets, latent_weight=settings.latent_weight, fresh=case.fresh),
        MULTI_SAMPLE: lambda: MultiSampleKD(case.targets, num_samples=settings.samples, fresh=case.fresh),
        MARGINAL: lambda: MarginalKD(case.targets, control_variate=not case.fresh),
    }


@torch.no_grad()
def law(program: NetworkProgram, targets: Sequence[str]) -> Tensor:
    """Probabilities of all joint states of the targets, float64, with one dimension per target.

    Each node that is not a target is summed out of the product of the tables, in an order that keeps the tables between small.
    """
    tables = copy.deepcopy(program).cpu().double().tables()
    operands = [part for name, table in tables.items() for part in (table, (*program.parents[name], name))]
    path, info = opt_einsum.contract_path(*operands, tuple(targets), optimize="auto")
    if info.largest_intermediate > LARGEST:
        size = f"{float(info.largest_intermediate):.0e}"
        raise SystemExit(f"the law of {len(targets)} targets needs a table of {size} entries: name fewer with --targets")
    return opt_einsum.contract(*operands, tuple(targets), optimize=path)


def kl_of_laws(p: Tensor, q: Tensor) -> float:
    """KL of two tables of probabilities of the same shape."""
    return float((torch.xlogy(p, p) - torch.xlogy(p, q)).sum())


def run_seed(seed: int, settings: BayesianNetworkSettings, place: Place) -> Run:
    """Distil and measure students of all widths. A figure is named by its measure and width, such as "kl 2"."""
    case = task(bif(settings.data) if settings.data else journey(), settings)
    exact = law(case.teacher, case.targets)
    teacher = freeze(case.teacher.to(settings.device).model)
    rows = settings.sample_rows
    models: dict[str, dict[str, float]] = {name: {} for name in methods(case, settings)}
    parameters = {}
    for width in settings.widths:
        pyro.set_rng_seed(seed)
        start = NeuralBayesianNetwork(case.parents, case.sizes, width)
        parameters[str(width)] = sum(p.numel() for p in start.parameters())
        for name, loss in methods(case, settings).items():
            student = copy.deepcopy(start).to(settings.device)
            pyro.set_rng_seed(seed)
            options: dict[str, Any] = {"weight": 1 / settings.rows, "steps": settings.steps, "settings": settings}
            label = f"seed {seed}, width {width}: {name}"
            turns = {"then": loss(), "then_from": max(settings.steps // 2, 1)} if name in (MULTI_SAMPLE, MARGINAL) else {}
            first = LocalKD(case.targets, fresh=case.fresh) if turns else loss()
            distiller = distil(student.model, teacher, first, settings.rows, label=label, **turns, **options)
            bounds = {
                "surrogate": paper_loss(case.targets, latent_weight=0.0, fresh=case.fresh),
                "local": LocalKD(case.targets, fresh=case.fresh),
            }
            found = {"kl": kl_of_laws(exact, law(student, case.targets))}
            found["seconds"] = sum(distiller.history["seconds"])
            found |= {key: bound.loss(student.model, teacher, rows) / rows for key, bound in bounds.items()}
            models[name] |= {f"{key} {width}": value for key, value in found.items()}
    return {
        "targets": list(case.targets),
        "nodes": len(case.parents),
        "states": exact.numel(),
        "parameters": parameters | {TEACHER: case.teacher_parameters},
        "widths": list(settings.widths),
        "models": models,
    }


def tables(runs: list[Run]) -> dict[str, Table]:
    """One table per measure, with a column per width."""
    first = runs[0]
    columns = [f"width {width}, {first['parameters'][str(width)]} parameters" for width in first["widths"]]
    what = (
        f"The network has {first['nodes']} nodes, the teacher {first['parameters'][TEACHER]} parameters; the targets are "
        f"{', '.join(first['targets'])}, with {first['states']} joint states. Names: "
    )
    made = {}
    for key, measure in MEASURES.items():
        rows = estimates(runs, [f"{key} {width}" for width in first["widths"]])
        made[key] = Table(measure, columns, rows, what + explain([TEACHER, *rows]))
    return made


def draw(runs: list[Run], out: Path) -> None:
    """Draw the KL against the width, one line per method: the mean over seeds, with its standard error."""
    widths = runs[0]["widths"]
    figure, ax = subplots(1, 1, figsize=(5.5, 4.0))
    rows = estimates(runs, [f"kl {width}" for width in widths])
    for name, row in rows.items():
        ax.errorbar(
            widths, [e.mean for e in row], [e.standard_error for e in row], marker="o", markersize=4, capsize=3, label=name
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(widths, map(str, widths))
    ax.minorticks_off()
    ax.set(xlabel="width of the student's perceptrons", ylabel="KL(teacher || student) of the targets, nats")
    ax.legend(fontsize=9)
    save(figure, out / "bayesian_network.png", explain(rows))


EXPERIMENT = Experiment("bayesian_network", __doc__ or "", PRESETS, run_seed, tables, draw)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
