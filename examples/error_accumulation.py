"""Do a student's errors grow with the depth of a program?

    python -m examples.error_accumulation                    # three seeds, some minutes each on one core
    python -m examples.error_accumulation --preset demo      # three students of the real-valued chain, a minute or two per seed
    python -m examples.error_accumulation --preset smoke     # the same in seconds, too short to learn

Teachers are chains z_1 -> ... -> z_L -> y whose law is given by a formula, of real numbers, counts or bits (models/chains.py);
students have one small network per layer. For each depth L, students with the same initialisation are distilled for the same steps:

- local: each layer learns on the teacher's states. With one network per layer and Adam without weight decay, the weight of the
  latent terms has no effect, so one line stands for all weights. The squared 2-Wasserstein distance instead of the KL has no effect
  either: between Gaussians with the same standard deviation s, the distance is 2 s^2 times the KL (--learn-scale makes them differ,
  and adds a line).
- surrogate (ours): the paper's loss. Each layer learns on states that the student makes from the teacher's noise, with several
  weights lambda. On counts and bits no gradient passes from a layer to those before it: every lambda but 0 has the same effect, and
  with 0 only the last layer learns.
- local first (ours): teacher forcing, so local distillation, for a first part of the steps, and surrogate distillation with lambda 0
  after that; on counts with gradients by implicit differentiation. A quarter of the steps is what SurrogateKD(["y"]) does by default.
- K samples (ours): on bits, local for half of the steps, and then the bound of 64 samples, MultiSampleKD; exact marginal (ours)
  likewise, with MarginalKD.

The continuous students start once as torch initialises them, and once at the identity, which the teacher's layers are close to.

The measure is KL(teacher || student) of the last state y. It is computed, not estimated: a state depends only on the one before, so
the law of y is a product of transition matrices, on a fine grid for real numbers and on all states for counts. If the student's
probability rounds to 0, the smallest number replaces it, so that a large KL, which comes from the tails, is a lower bound. The tables
also show both upper bounds that distillation minimises: the surrogate loss alone, and the local loss.

Written to ``--out``: results.json, error_accumulation.png (KL against L; mean and standard error over seeds).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from examples._chain_laws import binomial_law, bit_law, kl_of_laws, normal_law
from examples._chain_picture import draw_kl
from examples._experiment import Experiment, Place, Settings, run
from examples._methods import FORCED, LOCAL, MARGINAL, MULTI_SAMPLE, SURROGATE, explain
from examples._tables import Run, Table, estimates
from examples._training import distil, paper_loss
from models.chains import BinomialChain, BinomialStudent, BitChain, Chain, NormalChain, NormalStudent
from pyro_kd import LocalKD, MarginalKD, MultiSampleKD, SurrogateKD, freeze
from pyro_kd.divergences import reverse_kl, wasserstein2
from pyro_kd.losses import DistillationLoss
from pyro_kd.metrics import Estimate, count_kl, density_ratio_kl, histogram_kl
from pyro_kd.training import linear, switch

TARGETS = ["y"]
ALL = "all"
LAMBDA = {"lambda": "multiplies the latent terms"}
FAMILIES = ("continuous", "continuous, from the identity", "binomial", "bits")
MEASURES = {
    "kl": "KL(teacher || student) of y, nats",
    "ratio": "The same by density-ratio estimation from samples",
    "counted": "The same by counting samples",
    "seconds": "Seconds of training",
    "surrogate": "Surrogate bound on it (latent weight 0)",
    "local": "Local bound on it",
}


@dataclass(frozen=True)
class ErrorAccumulationSettings(Settings):
    """The settings; the defaults are the cpu preset.

    Attributes:
        families: the chains that are run, of FAMILIES.
        methods: the students, by the names in the tables, or all. Local distillation is always among them.
        normal_layers, binomial_layers, bit_layers: depths.
        scale: standard deviation of the continuous chains; the paper's 0.01 is taken as the variance.
        learn_scale: whether the students learn it.
        width: of the students' networks.
        bits, bit_teacher_width, bit_gain, bit_width: of the chains of bits; the last is of the students.
        samples: number K of samples of the bound.
        grid, reach: points of the grid for real numbers, from -reach to reach.
        sample_rows: draws for each bound and each estimate.
    """

    families: tuple[str, ...] = FAMILIES
    methods: tuple[str, ...] = (ALL,)
    normal_layers: tuple[int, ...] = (1, 2, 3, 5, 7, 10, 15, 20)
    binomial_layers: tuple[int, ...] = (1, 2, 3, 5, 10)
    bit_layers: tuple[int, ...] = (5, 10)
    scale: float = 0.1
    learn_scale: bool = False
    power: float = 1.1
    count: int = 1000
    count_power: float = 1.2
    width: int = 4
    bits: int = 4
    bit_teacher_width: int = 16
    bit_gain: float = 3.0
    bit_width: int = 2
    samples: int = 64
    steps: int = 800
    rows: int = 256
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    grid: int = 1601
    reach: float = 40.0
    sample_rows: int = 10_000


PRESETS = {
    "smoke": ErrorAccumulationSettings(
        normal_layers=(1, 3),
        binomial_layers=(1, 2),
        bit_layers=(2,),
        samples=4,
        count=100,
        steps=15,
        grid=1001,
        sample_rows=200,
    ),
    "demo": ErrorAccumulationSettings(
        families=("continuous",),
        methods=(f"{SURROGATE}, lambda 1", f"{FORCED}, 1/4"),
        normal_layers=(5, 10, 20),
    ),
    "cpu": ErrorAccumulationSettings(),
    "paper": ErrorAccumulationSettings(
        binomial_layers=(1, 2, 3, 5, 7, 10, 15, 20),
        bit_layers=(5, 10, 20),
        steps=10_000,
        rows=1024,
        weight_decay=1e-4,
        sample_rows=100_000,
    ),
}


@dataclass(frozen=True)
class Method:
    """How a student is distilled.

    Attributes:
        loss: makes the loss.
        teacher_forcing: its schedule, as a function of the number of steps.
        then: makes the loss that takes its place after half of the steps.
    """

    loss: Callable[[], DistillationLoss]
    teacher_forcing: Callable[[int], Callable[[int], float]] | None = None
    then: Callable[[], DistillationLoss] | None = None


@dataclass(frozen=True)
class Family:
    """A teacher, its students, and how they are distilled.

    Attributes:
        layers: the depths.
        teacher, student: make a program with so many layers.
        methods: by name.
        law: the law of y as probabilities, see :func:`normal_law` and :func:`binomial_law`.
        counted: estimate of the KL by counting samples.
    """

    layers: tuple[int, ...]
    teacher: Callable[[int], Chain]
    student: Callable[[int], Chain]
    methods: Mapping[str, Method]
    law: Callable[[Any], Tensor]
    counted: Callable[[Tensor, Tensor], Estimate] | None = None


def families(settings: ErrorAccumulationSettings) -> dict[str, Family]:
    """The pairs of teacher and students, by name."""
    surrogate = functools.partial(paper_loss, TARGETS)
    local = functools.partial(LocalKD, TARGETS)
    implicit = functools.partial(SurrogateKD, TARGETS, discrete_gradient="implicit")

    def local_until(share: float) -> Callable[[int], Callable[[int], float]]:
        return lambda steps: switch(1.0, 0.0, max(round(share * steps), 1))

    normal_methods = {
        LOCAL: Method(local),
        f"{SURROGATE}, lambda 1": Method(lambda: surrogate(latent_weight=1.0)),
        f"{SURROGATE}, lambda 0.1": Method(lambda: surrogate(latent_weight=0.1)),
        f"{SURROGATE}, lambda 0": Method(lambda: surrogate(latent_weight=0.0)),
        f"{FORCED}, 1/4": Method(lambda: SurrogateKD(TARGETS)),
        f"{FORCED}, 1/2": Method(lambda: SurrogateKD(TARGETS), local_until(1 / 2)),
        f"{FORCED}, coins": Method(lambda: SurrogateKD(TARGETS), lambda steps: linear(1.0, 0.0, max(steps // 2, 1))),
    }
    if settings.learn_scale:
        normal_methods[f"{LOCAL}, W2"] = Method(lambda: LocalKD(TARGETS, latent_divergence=wasserstein2))
    binomial_methods = {
        LOCAL: Method(local),
        f"{LOCAL}, reverse KL": Method(lambda: local(divergence=reverse_kl, latent_divergence=reverse_kl)),
        f"{SURROGATE}, lambda 1": Method(lambda: surrogate(latent_weight=1.0)),
        f"{SURROGATE}, lambda 0": Method(lambda: surrogate(latent_weight=0.0)),
        f"{SURROGATE}, implicit": Method(lambda: implicit(teacher_forcing=0.0)),
        f"{FORCED}, 1/4, implicit": Method(implicit),
        f"{FORCED}, 1/2, implicit": Method(implicit, local_until(1 / 2)),
    }
    bound = functools.partial(MultiSampleKD, TARGETS, num_samples=settings.samples)
    bit_methods = {
        LOCAL: Method(local),
        f"{SURROGATE}, lambda 1": Method(lambda: surrogate(latent_weight=1.0)),
        f"{MULTI_SAMPLE}, from the start": Method(bound),
        f"{MULTI_SAMPLE}, local for 1/2": Method(local, then=bound),
        f"{MARGINAL}, from the start": Method(lambda: MarginalKD(TARGETS, control_variate=True)),
        f"{MARGINAL}, local for 1/2": Method(local, then=lambda: MarginalKD(TARGETS, control_variate=True)),
    }

    def normal(identity: bool) -> Family:
        return Family(
            settings.normal_layers,
            lambda layers: NormalChain(layers, settings.power, settings.scale),
            lambda layers: NormalStudent(
                layers, settings.width, settings.scale, learn_scale=settings.learn_scale, identity=identity
            ),
            normal_methods,
            functools.partial(normal_law, points=settings.grid, reach=settings.reach),
            functools.partial(histogram_kl, bins=100, range=(-3.0, 3.0)),
        )

    binomial = Family(
        settings.binomial_layers,
        lambda layers: BinomialChain(layers, settings.count, settings.count_power),
        lambda layers: BinomialStudent(layers, settings.count, settings.width),
        binomial_methods,
        binomial_law,
        count_kl,
    )
    bits = Family(
        settings.bit_layers,
        lambda layers: BitChain(layers, settings.bits, settings.bit_teacher_width, settings.bit_gain),
        lambda layers: BitChain(layers, settings.bits, settings.bit_width),
        bit_methods,
        bit_law,
    )
    all_of_them = {
        "continuous": normal(False),
        "continuous, from the identity": normal(True),
        "binomial": binomial,
        "bits": bits,
    }
    known = {ALL, *(name for family in all_of_them.values() for name in family.methods)}
    unknown = [*(set(settings.families) - set(all_of_them)), *(set(settings.methods) - known)]
    if unknown:
        raise ValueError(f"no such chain or method: {', '.join(unknown)}. Chains: {FAMILIES}. Methods: {sorted(known)}")
    return {title: _chosen(all_of_them[title], settings.methods) for title in settings.families}


def _chosen(family: Family, methods: Sequence[str]) -> Family:
    kept = {name: method for name, method in family.methods.items() if ALL in methods or name in (LOCAL, *methods)}
    return replace(family, methods=kept)


def run_depth(family: Family, layers: int, seed: int, settings: ErrorAccumulationSettings) -> dict[str, dict[str, float]]:
    """Distil and measure the students of one depth: figures by method."""
    pyro.set_rng_seed(seed)
    start, taught = family.student(layers).state_dict(), family.teacher(layers)
    exact, steps = family.law(taught), settings.steps
    measured = {}
    for name, method in family.methods.items():
        pyro.set_rng_seed(seed)
        teacher, student = freeze(taught.model), family.student(layers)
        student.load_state_dict(start)
        distiller = distil(
            student.model,
            teacher,
            method.loss(),
            settings.rows,
            weight=1 / settings.rows,
            steps=steps,
            settings=settings,
            label=f"seed {seed}, {layers} layers: {name}",
            teacher_forcing=None if method.teacher_forcing is None else method.teacher_forcing(steps),
            then=None if method.then is None else method.then(),
            then_from=max(steps // 2, 1),
        )
        student.cpu()
        teacher.to("cpu")
        rows = settings.sample_rows
        with torch.no_grad():
            samples = teacher(rows), student.model(rows)
        measured[name] = {
            "kl": kl_of_laws(exact, family.law(student)),
            "seconds": sum(distiller.history["seconds"]),
            "surrogate": paper_loss(TARGETS, latent_weight=0.0).loss(student.model, teacher, rows) / rows,
            "local": LocalKD(TARGETS).loss(student.model, teacher, rows) / rows,
        }
        if family.counted is not None:
            measured[name] |= {"ratio": density_ratio_kl(*samples).mean, "counted": family.counted(*samples).mean}
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
                for name in family.methods
            },
        }
    return result


def tables(runs: list[Run]) -> dict[str, Table]:
    """One table per family and measure."""
    made = {}
    for title in _families_of(runs):
        layers = runs[0][title]["layers"]
        for key, measure in MEASURES.items():
            if f"{key} {layers[0]}" not in runs[0][title]["models"][LOCAL]:
                continue  # samples of bits are not samples of numbers
            rows = estimates([run[title] for run in runs], [f"{key} {depth}" for depth in layers])
            columns = [f"L = {depth}" for depth in layers]
            made[f"{title}: {key}"] = Table(f"Chain: {title}. {measure}", columns, rows, explain(rows, LAMBDA))
    return made


def _families_of(runs: Sequence[Run]) -> list[str]:
    return [title for title in FAMILIES if title in runs[0]]


def draw(runs: list[Run], out: Path) -> None:
    """KL against depth, in error_accumulation.png."""
    draw_kl(runs, _families_of(runs), out / "error_accumulation.png", LAMBDA)


EXPERIMENT = Experiment("error_accumulation", __doc__ or "", PRESETS, run_seed, tables, draw)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
