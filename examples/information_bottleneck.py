"""Does a small classifier learn a large one better with shared noise or with the large one's codes?

    python -m examples.information_bottleneck                     # three seeds, a few minutes on one core
    python -m examples.information_bottleneck --data cifar10 --data-root FOLDER
    python -m examples.information_bottleneck --preset smoke      # the same in seconds, too short to learn

The classifiers are variational information bottlenecks, x -> z -> label: the code z is random. A teacher learns the labels of
scikit-learn's digits. A small student learns from the teacher on the same images without their labels: by local distillation
(local), where its label layer is given the teacher's codes, or by surrogate distillation (surrogate, ours), where it is given its own
codes, made from the teacher's noise. Both match p(z | x) as well, with several weights and divergences. A student with the same
initialisation learns the labels (scratch).

Measured on held-out images, with p(label | x) averaged over draws of z: accuracy, agreement with the teacher, expected
calibration error, negative log-likelihood, and KL(teacher || student); and both upper bounds on that KL, per image.

Written to ``--out``: results.json, reliability.png (accuracy against confidence, seeds pooled).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from examples._experiment import DataSettings, Experiment, Place, fingerprint, run
from examples._methods import LOCAL, SCRATCH, SURROGATE, TEACHER, explain
from examples._pictures import save, subplots
from examples._tables import Run, Table, estimates
from examples._training import batches_of, distil, learn, optimisation, paper_loss
from models.bottleneck import Bottleneck
from pyro_kd import LocalKD, freeze
from pyro_kd.datasets import digits, load_images
from pyro_kd.divergences import wasserstein2
from pyro_kd.losses import DistillationLoss
from pyro_kd.training import ELBOObjective, Objective

Labelled = tuple[Tensor, Tensor]
TARGETS = ["label"]
W2_MEAN = {"latent_divergence": wasserstein2, "latent_reduction": "mean"}
LOSSES: dict[str, Callable[[], DistillationLoss]] = {
    f"{LOCAL}, KL, weight 1": lambda: LocalKD(TARGETS),
    f"{LOCAL}, KL, weight 0.1": lambda: LocalKD(TARGETS, latent_weight=0.1),
    f"{LOCAL}, mean W2, weight 1": lambda: LocalKD(TARGETS, **W2_MEAN),
    f"{LOCAL}, mean W2, weight 0.1": lambda: LocalKD(TARGETS, latent_weight=0.1, **W2_MEAN),
    f"{SURROGATE}, KL, weight 1": lambda: paper_loss(TARGETS, latent_weight=1.0),
    f"{SURROGATE}, KL, weight 0.1": lambda: paper_loss(TARGETS),
    f"{SURROGATE}, mean W2, weight 1": lambda: paper_loss(TARGETS, latent_weight=1.0, **W2_MEAN),
    f"{SURROGATE}, mean W2, weight 0.1": lambda: paper_loss(TARGETS, **W2_MEAN),
    f"{SURROGATE}, weight 0": lambda: paper_loss(TARGETS, latent_weight=0.0),
}
W2_MEANING = {
    "mean W2": "the latent divergence is the squared 2-Wasserstein distance, averaged over the dimensions of the code",
    "weight": "multiplies the latent divergence",
}
FIGURES = {
    "accuracy": "accuracy, %",
    "agreement": "agreement, %",
    "calibration_error": "calibration error, %",
    "nll": "negative log-lik.",
    "kl": "KL(teacher || student)",
    "surrogate_bound": "surrogate bound",
    "local_bound": "local bound",
}
PICTURED = (  # both methods with the same weight and divergence
    TEACHER,
    f"{LOCAL}, KL, weight 1",
    f"{LOCAL}, mean W2, weight 1",
    SCRATCH,
    f"{SURROGATE}, KL, weight 1",
    f"{SURROGATE}, mean W2, weight 1",
)


@dataclass(frozen=True)
class InformationBottleneckSettings(DataSettings):
    """The settings; the defaults are the cpu preset."""

    data: str = "digits"
    held_out: int = 360
    latents: int = 16
    teacher_hidden: tuple[int, ...] = (256, 256)
    student_hidden: tuple[int, ...] = (16, 16)
    beta: float = 1e-3
    teacher_steps: int = 1500
    steps: int = 1500
    rows: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    draws: int = 200


PRESETS = {
    "smoke": InformationBottleneckSettings(teacher_hidden=(32,), teacher_steps=60, steps=20, draws=10),
    "cpu": InformationBottleneckSettings(),
    "paper": InformationBottleneckSettings(
        latents=256,
        teacher_hidden=(1024, 1024),
        student_hidden=(256, 256),
        teacher_steps=20_000,
        steps=20_000,
        learning_rate=1e-4,
    ),
}


def objective(net: Bottleneck, settings: InformationBottleneckSettings) -> Objective:
    """The bottleneck's loss in nats per image: an ELBO whose KL has the weight beta."""
    weights = {"weight": 1 / settings.rows, "latent_weight": lambda step: settings.beta}
    return ELBOObjective(TraceMeanField_ELBO(), net.model, net.guide, **weights)


def calibration(log_probs: Tensor, labels: Tensor, bins: int = 10) -> list[tuple[int, float, float]]:
    """For each of ``bins`` intervals of confidence (i / bins, (i + 1) / bins]: count, mean confidence, accuracy; 0 if it is empty.

    Args:
        log_probs: log probabilities of the classes, shape (rows, classes).
        labels: the true classes, shape (rows,).
        bins: number of intervals.
    """
    confidence, predicted = log_probs.exp().max(-1)
    index = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    rows = []
    for i in range(bins):
        inside = index == i
        count = int(inside.sum())
        mean = [float(value[inside].double().mean()) if count else 0.0 for value in (confidence, predicted == labels)]
        rows.append((count, *mean))
    return rows


def calibration_error(table: Sequence[tuple[int, float, float]]) -> float:
    """Expected calibration error: the mean over images of |accuracy - confidence| in their interval (Guo et al., 2017)."""
    return sum(count * abs(accuracy - confidence) for count, confidence, accuracy in table) / sum(row[0] for row in table)


def measure(log_probs: Tensor, labels: Tensor, teacher: Tensor) -> dict[str, float]:
    """The figures of a classifier's log probabilities beside the teacher's, both of shape (rows, classes)."""
    predicted = log_probs.argmax(-1)
    return {
        "accuracy": 100 * (predicted == labels).double().mean().item(),
        "agreement": 100 * (predicted == teacher.argmax(-1)).double().mean().item(),
        "calibration_error": 100 * calibration_error(calibration(log_probs, labels)),
        "nll": -log_probs.gather(-1, labels.unsqueeze(-1)).double().mean().item(),
        "kl": (teacher.exp() * (teacher - log_probs)).sum(-1).double().mean().item(),
    }


def load(settings: InformationBottleneckSettings, seed: int) -> tuple[Labelled, Labelled, int]:
    """Images to train on and held-out images, as rows from 0 to 1, with their labels; and the number of classes."""
    if settings.data == "digits":  # at 8 x 8; each seed has its own split
        seen, unseen = digits().split(settings.held_out, seed)
        parts = [(part.images.flatten(1), part.labels) for part in (seen, unseen)]
        return parts[0], parts[1], 10
    images = [load_images(settings.data, settings.data_root or None, train=train) for train in (True, False)]
    if images[0].labels.ndim != 1:
        raise SystemExit(f"--data {settings.data}: the images have attributes, but a classifier needs classes")
    parts = [(part.floats().flatten(1), part.labels) for part in images]
    return parts[0], parts[1], len(images[0].classes)


def run_seed(seed: int, settings: InformationBottleneckSettings, place: Place) -> Run:
    """Train and measure all classifiers of one seed."""
    (x, seen_labels), (test, labels), classes = load(settings, seed)
    labels, pixels = labels.to(settings.device), x.shape[1]
    start = Bottleneck(pixels, settings.latents, classes, settings.student_hidden).state_dict()

    def small() -> Bottleneck:
        pyro.set_rng_seed(seed)  # the same batches and noise for all
        student = Bottleneck(pixels, settings.latents, classes, settings.student_hidden).to(settings.device)
        student.load_state_dict(start)
        return student

    teacher = Bottleneck(pixels, settings.latents, classes, settings.teacher_hidden).to(settings.device)
    names = ("held_out", "beta", "teacher_steps", "rows", "student_hidden")
    depends_on = {"seed": seed, "data": fingerprint(x, seen_labels)} | {name: getattr(settings, name) for name in names}

    def learn_labels(net: Bottleneck, steps: int, name: str) -> None:
        batches = batches_of(settings.rows, x, seen_labels)
        learn(objective(net, settings), batches=batches, steps=steps, settings=settings, label=f"seed {seed}: {name}")

    place.trained(
        teacher, depends_on | optimisation(settings), lambda: learn_labels(teacher, settings.teacher_steps, TEACHER)
    )
    program = freeze(teacher.classify)

    nets = {TEACHER: teacher, SCRATCH: small()}
    learn_labels(nets[SCRATCH], settings.steps, SCRATCH)
    for name, make in LOSSES.items():
        nets[name] = small()
        distil(
            nets[name].classify,
            program,
            make(),
            batches=batches_of(settings.rows, x),
            weight=1 / settings.rows,
            steps=settings.steps,
            settings=settings,
            label=f"seed {seed}: {name}",
        )

    measured, reliability = {}, {}
    test = test.to(settings.device)
    for name, net in nets.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        log_probs = net.predict(test, settings.draws)
        if name == TEACHER:
            target = log_probs
        measured[name] = {"parameters": sum(p.numel() for p in net.parameters()), **measure(log_probs, labels, target)}
        reliability[name] = calibration(log_probs, labels)
        if name != TEACHER:
            for key, bound in (
                ("surrogate_bound", paper_loss(TARGETS, latent_weight=0.0)),
                ("local_bound", LocalKD(TARGETS)),
            ):
                measured[name][key] = bound.loss(net.classify, program, test) / len(test)
    return {"models": measured, "reliability": reliability}


def tables(runs: list[Run]) -> dict[str, Table]:
    """The figures of all classifiers."""
    rows = estimates(runs, list(FIGURES))
    sizes = {name: str(figures["parameters"]) for name, figures in runs[0]["models"].items()}
    columns = ["parameters", *FIGURES.values()]
    title = "Held-out images; log-likelihood, KL and bounds in nats per image"
    note = explain(rows, W2_MEANING)
    return {"classifiers": Table(title, columns, {name: [sizes[name], *row] for name, row in rows.items()}, note)}


def draw(runs: list[Run], out: Path) -> None:
    """Draw reliability diagrams: accuracy against confidence, over the images of all seeds; the area of a dot counts images."""
    figure, axes = subplots(2, 3, figsize=(9, 6.6), sharex=True, sharey=True)
    for ax, name in zip(axes.flat, PICTURED, strict=True):
        bins = torch.tensor([run["reliability"][name] for run in runs], dtype=torch.float64)  # seed, interval, figure
        count = bins[..., 0].sum(0)
        confidence, accuracy = (bins[..., :1] * bins[..., 1:]).sum(0)[count > 0].div(count[count > 0, None]).unbind(-1)
        count = count[count > 0]
        error = (accuracy * (1 - accuracy) / count).sqrt()
        ax.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        ax.vlines(confidence, confidence, accuracy, color="tab:red", linewidth=1)
        ax.errorbar(confidence, accuracy, error, fmt="none", ecolor="0.5", linewidth=0.8)
        ax.scatter(confidence, accuracy, s=8 + 150 * count / count.sum(), color="tab:blue", zorder=3)
        table = [tuple(row) for row in torch.stack([count, confidence, accuracy], -1).tolist()]
        ax.set_title(f"{name}\ncalibration error {100 * calibration_error(table):.1f} %", fontsize=10)
        ax.set_xlim(0, 1.06)
        ax.set_ylim(-0.04, 1.06)
    for ax in axes[-1]:
        ax.set_xlabel("confidence")
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy")
    save(figure, out / "reliability.png", explain(PICTURED, W2_MEANING))


EXPERIMENT = Experiment("information_bottleneck", __doc__ or "", PRESETS, run_seed, tables, draw)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
