"""Compress a recurrent model of drawings without data: what a small student learns from a teacher, and what from the drawings.

    python -m examples.vrnn                                                         # embedded handwriting, three seeds
    python -m examples.vrnn --data stroke3 --data-root drawings.npz                 # drawings of your own, in stroke-3 form
    python -m examples.vrnn --preset paper --data-root folder                       # IAM-OnDB at the paper's sizes; needs a GPU

A teacher, a variational recurrent network, learns sequences of pen movements by its ELBO with an annealed KL. Small students of one
architecture and one initialisation learn with the same number of steps of the same optimiser:

- ``scratch`` from the drawings, as the teacher did;
- ``local-W`` from the teacher, by local distillation with weight W of the latents' KL; ``local-w2-W`` with the squared 2-Wasserstein
  distance averaged over dimensions instead;
- ``ours-W`` from the teacher, by surrogate distillation with lambda W; ``ours-w2-W`` likewise.

Distillation is data-free: it knows the number of rows and of points. Every term, of a target or of a latent, is summed over the
points of a drawing and then divided by rows and points, so that W is the paper's lambda. ``--students`` takes any of these names.

Points are standardised by the training data, and movements beyond ``clip`` standard deviations are cut to it: pens jump far between
two strokes. The movements' Gaussian has a fixed ``scale``: 1 in the paper. That is larger than most movements within a stroke, so
that what is drawn looks like scribble; the small presets take 0.3. Drawings shorter than ``shortest`` are left out, longer ones than
``length`` cut, others masked.

Measured on drawings that the models make, against held-out data and against the teacher's: the share of points where the pen is
lifted, 1-Wasserstein distances of the length of movements, of the points in a stroke (the last one cut where the drawing ends) and of
the angle between successive movements, and MMD and the nearest-neighbour test of whole drawings. Lengths are in units of the mean
standard deviation of dx and dy. And in nats a point: an upper bound on KL(teacher || student), the smaller of the surrogate and the
local one; and the ELBO of held-out drawings, with the guide that the model was trained with, if it was, and with a guide
that is fitted to the data afterwards, from a new initialisation, while the generator stays as it is.

The paper preset has the paper's sizes, data and learning rate; the held-out lines are a random tenth of the part to train on.

Written to ``--out``: results.json, seed-K.json, strokes-K.png.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from examples._experiment import (
    DataSettings,
    Experiment,
    Place,
    Run,
    Table,
    adam,
    cosine,
    estimates,
    fingerprint,
    over_seeds,
    run,
)
from models.vrnn import VRNN
from pyro_kd import Distiller, LocalKD, SurrogateKD, freeze, record_noise, replay_noise
from pyro_kd.datasets import Standardisation, load_strokes
from pyro_kd.divergences import kl, wasserstein2
from pyro_kd.losses import DistillationLoss
from pyro_kd.metrics import emd, mmd, nearest_neighbour_accuracy
from pyro_kd.training import ELBOObjective, Trainer, linear

AT_ONCE = 250  # rows of a call when measuring
FEATURES = {"step": "movement", "stroke": "stroke", "angle": "angle"}


@dataclass(frozen=True)
class VRNNSettings(DataSettings):
    """Settings of the experiment.

    Attributes:
        length: points of a drawing.
        shortest: drawings with fewer points are left out.
        held_out: share of the drawings.
        clip: largest movement, in standard deviations; 0 for none.
        scale: standard deviation of the movements given the decoder's output.
        warm_up: share of the steps in which the KL of an ELBO is turned on.
        steps: of each student.
        epochs: where it is not 0, teacher and students have so many passes through the data instead of their steps.
        cosine: whether the learning rate goes to 0 along a cosine.
        guide_steps: of each guide that is fitted to a model for its ELBO; 0 for none.
        measured: drawings made of each model to measure it.
        students: ``scratch``, ``local-W``, ``local-w2-W``, ``ours-W``, ``ours-w2-W`` with a weight W.
    """

    data: str = "hershey"
    length: int = 24
    shortest: int = 24
    held_out: float = 0.1
    clip: float = 5.0
    scale: float = 0.3
    latents: int = 16
    teacher_width: int = 96
    teacher_recurrent: int = 192
    student_width: int = 24
    student_recurrent: int = 48
    batch: int = 32
    teacher_steps: int = 1500
    steps: int = 900
    epochs: int = 0
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    cosine: bool = True
    warm_up: float = 0.25
    guide_steps: int = 200
    measured: int = 2000
    students: tuple[str, ...] = ("scratch", "local-1", "local-0.001", "ours-1", "ours-0.001")


PRESETS = {
    "smoke": VRNNSettings(
        length=6,
        shortest=6,
        latents=2,
        teacher_width=12,
        teacher_recurrent=16,
        student_width=4,
        student_recurrent=6,
        teacher_steps=30,
        steps=20,
        learning_rate=1e-2,
        guide_steps=3,
        measured=250,
        students=("scratch", "local-1", "ours-0.001"),
    ),
    "cpu": VRNNSettings(),
    "paper": VRNNSettings(
        data="iam-ondb",
        length=628,
        shortest=1,
        clip=0.0,
        scale=1.0,
        teacher_width=512,
        teacher_recurrent=1200,
        student_width=128,
        student_recurrent=600,
        epochs=200,
        learning_rate=1e-4,
        cosine=False,
        guide_steps=5000,
        students=("scratch", "local-1", "local-0.001", "ours-0.001"),
    ),
}


@dataclass(frozen=True)
class Drawings:
    """Standardised points of shape (n, length, 3), with the mask of those that count, and the map to them."""

    points: Tensor
    mask: Tensor
    scale: Standardisation

    def __len__(self) -> int:
        return len(self.points)


def load(settings: VRNNSettings, seed: int) -> tuple[Drawings, Drawings]:
    """Drawings to train on, and held-out ones, both standardised by the former."""
    drawings = load_strokes(settings.data, settings.data_root or None, "train")
    drawings = drawings.where(drawings.lengths >= settings.shortest)
    seen, unseen = drawings.split(round(settings.held_out * len(drawings)), seed)
    _, scale = seen.standardised()
    parts = []
    for part in (seen, unseen):
        points, mask = part.standardised(scale.mean, scale.std)[0].padded(settings.length)
        if settings.clip:
            points[..., :2].clamp_(-settings.clip, settings.clip)
        parts.append(Drawings(points.to(settings.device), mask.to(settings.device), scale))
    return parts[0], parts[1]


def targets(settings: VRNNSettings) -> list[str]:
    """The sites that a student is to reproduce: every pen and every movement."""
    return [f"{kind}{t}" for t in range(1, settings.length + 1) for kind in ("pen", "move")]


def loss_named(name: str, settings: VRNNSettings) -> DistillationLoss:
    """The distillation loss of a student, as ``--students`` names it."""
    found = re.fullmatch(r"(local|ours)-(w2-)?(\d+\.?\d*)", name)
    if found is None:
        raise ValueError(f"no student is named {name!r}: scratch, local-W, local-w2-W, ours-W or ours-w2-W with a number W")
    kind, form, weight = found.groups()
    return (LocalKD if kind == "local" else SurrogateKD)(
        targets(settings),
        latent_weight=float(weight),
        latent_divergence=wasserstein2 if form else kl,
        latent_reduction="mean" if form else "sum",
    )


def learn_from_data(
    vrnn: VRNN, data: Drawings, steps: int, settings: VRNNSettings, label: str, warm_up: bool = True
) -> VRNN:
    """Maximise the ELBO of drawings."""
    loader = DataLoader(TensorDataset(data.points, data.mask), batch_size=settings.batch, shuffle=True, drop_last=True)
    turn_on = max(round(settings.warm_up * steps), 1)
    elbo = ELBOObjective(
        TraceMeanField_ELBO(),  # the KL of each z in closed form, given the draws before it
        vrnn.model,
        vrnn.guide,
        weight=1 / (settings.batch * settings.length),
        arguments=lambda x, mask: (len(x), settings.length, x, None if mask.all() else mask),
        latent_weight=linear(0.0, 1.0, turn_on) if warm_up else None,
    )
    trainer = Trainer(
        elbo,
        adam(settings.learning_rate, settings.weight_decay),
        scheduler=schedule(steps, settings),
        compile=settings.compile,
    )
    trainer.fit(batches=loader, steps=steps, progress=label)
    return vrnn


def distil(student: VRNN, teacher: Any, loss: DistillationLoss, steps: int, settings: VRNNSettings, label: str) -> VRNN:
    """Teach a student what a frozen teacher generates, without data."""
    distiller = Distiller(
        student.model,
        teacher,
        adam(settings.learning_rate, settings.weight_decay),
        loss,
        weight=1 / (settings.batch * settings.length),
        scheduler=schedule(steps, settings),
        compile=settings.compile,
    )
    distiller.fit(settings.batch, settings.length, steps=steps, progress=label)
    return student


def schedule(steps: int, settings: VRNNSettings) -> Callable[[torch.optim.Optimizer], Any] | None:
    return cosine(steps) if settings.cosine else None


def fitted_guide(vrnn: VRNN, data: Drawings, seed: int, settings: VRNNSettings, label: str) -> VRNN:
    """A copy of a model whose recognition network is learned anew from data while the generator stays as it is."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    widths = vrnn.generative["points"][0].out_features, vrnn.recurrent, vrnn.generative["latents"][0].in_features
    copy = VRNN(*widths, scale=vrnn.scale).to(settings.device)
    copy.generative.load_state_dict(vrnn.generative.state_dict())
    copy.generative.requires_grad_(False).eval()
    return learn_from_data(copy, data, settings.guide_steps, settings, label, warm_up=False)


@torch.no_grad()
def elbo_of(vrnn: VRNN, data: Drawings, limit: int) -> float:
    """ELBO in nats a point, one draw of z each, of the first drawings."""
    pyro.clear_param_store()
    total = 0.0
    for x, mask in zip(data.points[:limit].split(AT_ONCE), data.mask[:limit].split(AT_ONCE), strict=True):
        total -= TraceMeanField_ELBO().loss(vrnn.model, vrnn.guide, len(x), x.shape[1], x, mask)
    return total / int(data.mask[:limit].sum())


def bound(loss: DistillationLoss, student: VRNN, teacher: Any, settings: VRNNSettings) -> float:
    """A distillation loss in nats a point, averaged over the measured drawings."""
    calls = max(settings.measured // AT_ONCE, 1)
    total = sum(loss.loss(student.model, teacher, AT_ONCE, settings.length) for _ in range(calls))
    return total / (calls * AT_ONCE * settings.length)


@torch.no_grad()
def made_by(model: Callable[..., Tensor], settings: VRNNSettings, like: Drawings) -> Drawings:
    """Drawings that a model makes, standardised as those of the data, and of their lengths: a model has no end of a drawing."""
    calls = max(settings.measured // AT_ONCE, 1)
    points = torch.cat([model(AT_ONCE, settings.length) for _ in range(calls)])
    return Drawings(points, like.mask[torch.arange(len(points), device=points.device) % len(like.mask)], like.scale)


def features(drawings: Drawings) -> dict[str, Tensor]:
    """What is compared: all pens; all lengths of movements, points in strokes, and angles between movements; whole drawings."""
    mask = drawings.mask.cpu()
    moves = moves_of(drawings)
    pen = drawings.points[..., 2].cpu()
    ends = pen.bool()
    ends[torch.arange(len(mask)), mask.sum(1) - 1] = True  # the end of a drawing ends its last stroke
    places = torch.cat([torch.tensor([-1]), ends[mask].nonzero().squeeze(-1)])
    before, after = moves[:, :-1], moves[:, 1:]
    cross = before[..., 0] * after[..., 1] - before[..., 1] * after[..., 0]
    angle = torch.atan2(cross, (before * after).sum(-1)).abs()
    positions = moves.cumsum(1) * mask.unsqueeze(-1)
    return {
        "pen": pen[mask],
        "step": moves.norm(dim=-1)[mask],
        "stroke": places.diff().float(),
        "angle": angle[mask[:, 1:]],
        "drawing": torch.cat([positions, (pen * mask).unsqueeze(-1)], -1).flatten(1),
    }


def moves_of(drawings: Drawings) -> Tensor:
    """Movements with the data's proportions, in units of the mean standard deviation of dx and dy; shape (n, length, 2)."""
    return drawings.scale.restore(drawings.points[..., :2].cpu()) / drawings.scale.std.mean()


def distances(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """How far apart two sets of drawings are; see :func:`features`."""
    found = {"pen": abs(float(one["pen"].mean() - other["pen"].mean()))}
    for name in FEATURES:
        found[name] = emd(one[name], other[name])
    rows = min(len(one["drawing"]), len(other["drawing"]), 1000)
    x, y = one["drawing"][:rows], other["drawing"][:rows]
    return {**found, "mmd": mmd(x, y), "neighbour": nearest_neighbour_accuracy(x, y)}


def run_seed(seed: int, settings: VRNNSettings, place: Place) -> Run:
    """Train and measure the models of one seed."""
    seen, unseen = load(settings, seed)
    passes = settings.epochs * (len(seen) // settings.batch)
    teacher_steps, steps = passes or settings.teacher_steps, passes or settings.steps
    print(f"seed {seed}: {len(seen)} drawings to learn from, {len(unseen)} held out")

    pyro.set_rng_seed(seed)
    teacher = VRNN(settings.teacher_width, settings.teacher_recurrent, settings.latents, settings.scale).to(settings.device)
    names = ("length", "scale", "batch", "learning_rate", "weight_decay", "cosine", "warm_up")
    place.trained(
        teacher,
        {"seed": seed, "steps": teacher_steps, "data": fingerprint(seen.points, seen.mask)}
        | {name: asdict(settings)[name] for name in names},
        lambda: learn_from_data(teacher, seen, teacher_steps, settings, f"seed {seed}: teacher"),
    )
    frozen = freeze(teacher.model)

    pyro.set_rng_seed(seed)
    small = settings.student_width, settings.student_recurrent, settings.latents, settings.scale
    start = VRNN(*small).state_dict()
    models = {"teacher": teacher}
    for name in settings.students:
        pyro.clear_param_store()
        student = VRNN(*small).to(settings.device)
        student.load_state_dict(start)
        label = f"seed {seed}: {name}"
        pyro.set_rng_seed(seed)
        if name == "scratch":
            models[name] = learn_from_data(student, seen, steps, settings, label)
        else:
            models[name] = distil(student, frozen, loss_named(name, settings), steps, settings, label)

    measured: dict[str, dict[str, Any]] = {"data": {}}
    pyro.set_rng_seed(seed + 1000)
    pool = Drawings(seen.points[: settings.measured], seen.mask[: settings.measured], seen.scale)
    references = {"data": features(unseen), "teacher": features(made_by(frozen, settings, seen))}
    made = {"data": features(pool)}
    for name, vrnn in models.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        made[name] = features(made_by(vrnn.model, settings, seen))
        measured[name] = {"parameters": sum(parameter.numel() for parameter in vrnn.generative.parameters())}
        if name != "teacher":
            pair = (SurrogateKD(targets(settings), latent_weight=0.0), LocalKD(targets(settings), latent_weight=1.0))
            surrogate, local = (bound(loss, vrnn, frozen, settings) for loss in pair)
            measured[name] |= {"surrogate": surrogate, "local": local, "bound": min(surrogate, local)}
        if name in ("teacher", "scratch"):
            measured[name]["elbo"] = elbo_of(vrnn, unseen, settings.measured)
        if settings.guide_steps:
            fitted = fitted_guide(vrnn, seen, seed, settings, f"seed {seed}: guide of {name}")
            measured[name]["fitted_elbo"] = elbo_of(fitted, unseen, settings.measured)
    for name, mine in made.items():
        measured[name] |= {
            f"{key}/{kind}": value for kind, theirs in references.items() for key, value in distances(mine, theirs).items()
        }
    pyro.clear_param_store()
    draw_strokes(models, unseen, seed, settings, place.out / f"strokes-{seed}.png")
    return {
        "models": measured,
        "drawings": [len(seen), len(unseen)],
        "pen": {name: float(mine["pen"].mean()) for name, mine in made.items()},
    }


@torch.no_grad()
def draw_strokes(
    models: dict[str, VRNN], data: Drawings, seed: int, settings: VRNNSettings, path: Path, columns: int = 10
) -> None:
    """Held-out drawings, and drawings that all the models make of the same noise; a row each."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    pyro.set_rng_seed(seed)
    with record_noise() as noise:
        models["teacher"].model(columns, settings.length)
    rows = {"data": Drawings(data.points[:columns], data.mask[:columns], data.scale)}
    for name, vrnn in models.items():
        points = replay_noise(vrnn.model, noise=noise)(columns, settings.length)
        rows[name] = Drawings(points, torch.ones(points.shape[:2], dtype=torch.bool), data.scale)
    figure, axes = plt.subplots(len(rows), 1, figsize=(columns, 1.1 * len(rows)), layout="constrained")
    for ax, (name, drawings) in zip(axes, rows.items(), strict=True):
        for column, (moves, points, mask) in enumerate(
            zip(moves_of(drawings), drawings.points.cpu(), drawings.mask.cpu(), strict=True)
        ):
            for stroke in strokes_in_cell(moves[mask], points[mask, 2]):
                x, y = stroke.T.tolist()
                ax.plot([x + column for x in x], y, color="black", lw=1, marker="." if len(x) == 1 else None, ms=2)
        ax.set(
            xlim=(-0.5, columns - 0.5), ylim=(0.5, -0.5), aspect="equal", xticks=[], yticks=[]
        )  # y goes down, as on a screen
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.spines[:].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def strokes_in_cell(moves: Tensor, pen: Tensor, size: float = 0.8) -> list[Tensor]:
    """The strokes of one drawing as positions, moved and scaled to fit a square around 0 with sides ``size``."""
    positions = moves.cumsum(0)
    low, high = positions.min(0).values, positions.max(0).values
    positions = (positions - (low + high) / 2) * (size / float((high - low).max().clamp(min=1e-6)))
    ends = [0, *(pen.nonzero().squeeze(-1) + 1).tolist(), len(pen)]
    return [positions[a:b] for a, b in itertools.pairwise(ends) if b > a]


def tables(runs: list[Run]) -> dict[str, Table]:
    """Likelihoods, and distances against the data and against the teacher."""
    parameters = {name: str(found.get("parameters", "-")) for name, found in runs[0]["models"].items()}
    likelihoods = estimates(runs, ["elbo", "fitted_elbo", "bound", "surrogate", "local"])
    pens = {name: [over_seeds([run["pen"][name] for run in runs])] for name in runs[0]["pen"]}
    found = {
        "likelihood": Table(
            "Nats a point: held-out ELBO with the model's own guide and with a fitted one; bounds on KL(teacher || student)",
            ["parameters", "ELBO", "ELBO, fitted guide", "bound", "surrogate", "local"],
            {name: [parameters[name], *row] for name, row in likelihoods.items() if name != "data"},
        )
    }
    columns = ["pen up", "difference", *FEATURES.values(), "MMD²", "1-NN accuracy"]
    for kind, title in (("data", "held-out data"), ("teacher", "the teacher's drawings")):
        rows: dict[str, Sequence[Any]] = {
            name: [*pens[name], *row]
            for name, row in estimates(runs, [f"{key}/{kind}" for key in ("pen", *FEATURES, "mmd", "neighbour")]).items()
        }
        found[kind] = Table(f"Drawings against {title}; the row data is training data", columns, rows)
    return found


EXPERIMENT = Experiment(name="vrnn", description=__doc__ or "", presets=PRESETS, run_seed=run_seed, tables=tables)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
