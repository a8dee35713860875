"""Compress a recurrent model of drawings without data: does a small student learn more from a teacher or from the drawings?

    python -m examples.vrnn                                                         # embedded handwriting, three seeds
    python -m examples.vrnn --data stroke3 --data-root drawings.npz                 # your own drawings, in stroke-3 form
    python -m examples.vrnn --preset paper --data-root folder                       # IAM-OnDB at the paper's sizes; needs a GPU

A teacher, a variational recurrent network, learns sequences of pen movements by its ELBO with an annealed KL. Small students of one
architecture and one initialisation learn for the same number of steps with the same optimiser:

- ``scratch``: from the drawings, as the teacher did;
- ``local-W``: from the teacher, by local distillation with weight W of the latents' KL; ``local-w2-W`` uses the squared 2-Wasserstein
  distance averaged over dimensions instead;
- ``surrogate-W``: from the teacher, by surrogate distillation (ours) with lambda W; ``surrogate-w2-W`` likewise;
- ``first-W``: by local distillation in the first quarter of the steps, and surrogate distillation with lambda W after that, the
  default of SurrogateKD; ``policy-W``: the same, but from the middle of the steps on more and more on the student's own points, which
  the teacher scores (OnPolicyKD); ``first-w2-W`` and ``policy-w2-W`` likewise.

``--students`` takes any of these names. Distillation needs no data, only the number of rows and of points. Every term, of a target or
of a latent, is summed over the points of a drawing and then divided by rows and points, so that W is the paper's lambda.

Points are standardised by the training data. Movements beyond ``clip`` standard deviations are cut to ``clip``, since pens jump far
between strokes. The movements' Gaussian has a fixed ``scale``: 1 in the paper. That is larger than most movements within a stroke, so
that the drawings look like scribble; the small presets use 0.3. Drawings with fewer points than ``shortest`` are left out, those with
more than ``length`` are cut, and the others are masked.

The drawings that the models make are compared with held-out data and with the teacher's: the share of points where the pen is
lifted; 1-Wasserstein distances of the length of movements, of the points per stroke (the last stroke is cut where the drawing
ends) and of the angle between successive movements; MMD and the nearest-neighbour test of whole drawings. The same for the end
of long drawings, far beyond the points that the students were trained on, where errors of earlier points have added up
(exposure bias). Lengths are in units of the mean standard deviation of dx and dy. In nats per point there are an upper bound on
KL(teacher || student), the smaller of the surrogate and the local one; and the ELBO of held-out drawings, with the guide that
the model was trained with, if there is one, and with a guide that is fitted to the data afterwards, from a new initialisation,
while the generator stays as it is.

The paper preset has the paper's sizes, data and learning rate; the held-out lines are a random tenth of the part to train on.

Written to ``--out``: results.json, seed-K.json, strokes-K.png.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from examples._drawings import FEATURES, Drawings, distances, draw_strokes, features
from examples._experiment import DataSettings, Experiment, Place, fingerprint, run
from examples._methods import FITTED, SCRATCH, SELECTED, TEACHER, explain
from examples._tables import Run, Table, estimates, over_seeds
from examples._training import batches_of, distil, learn, optimisation, paper_loss
from examples._vrnn_students import student_named, targets
from models.vrnn import VRNN
from pyro_kd import LocalKD, OnPolicyKD, freeze, record_noise, replay_noise
from pyro_kd.datasets import Standardisation, load_strokes
from pyro_kd.losses import DistillationLoss
from pyro_kd.training import ELBOObjective, fit_layers, linear, select_weights

AT_ONCE = 250  # rows per call when measuring
WEIGHT = {"weight": "multiplies the latent terms"}


@dataclass(frozen=True)
class VRNNSettings(DataSettings):
    """Settings of the experiment.

    Attributes:
        length: points of a drawing.
        shortest: drawings with fewer points are left out.
        held_out: share of the drawings.
        clip: largest movement, in standard deviations; 0 for none.
        scale: standard deviation of the movements given the decoder's output.
        warm_up: share of the steps over which the KL of an ELBO is turned on.
        steps: steps of each student.
        epochs: if not 0, teacher and students make so many passes through the data, instead of their steps.
        guide_steps: steps of each guide that is fitted to a model for its ELBO; 0 for no such guide.
        measured: number of drawings that each model makes to be measured.
        long: points of long drawings, whose last ``length`` points are measured; 0 for none.
        students: ``scratch``, ``local-W``, ``local-w2-W``, ``surrogate-W``, ``fitted-W`` and so on, with a weight W.
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
    warm_up: float = 0.25
    guide_steps: int = 200
    measured: int = 2000
    long: int = 96
    students: tuple[str, ...] = ("scratch", "local-1", "local-0.001", "surrogate-1", "surrogate-0.001")


PRESETS = {
    "smoke": VRNNSettings(
        length=6, shortest=6, latents=2, teacher_width=12, teacher_recurrent=16, student_width=4, student_recurrent=6,
        teacher_steps=30, steps=20, learning_rate=1e-2, guide_steps=3, measured=250, long=12,
        students=("scratch", "local-1", "surrogate-0.001"),
    ),
    "cpu": VRNNSettings(),
    "paper": VRNNSettings(
        data="iam-ondb", length=628, shortest=1, clip=0.0, scale=1.0, teacher_width=512, teacher_recurrent=1200,
        student_width=128, student_recurrent=600, epochs=200, learning_rate=1e-4, cosine=False, guide_steps=5000, long=2512,
        students=("scratch", "local-1", "local-0.001", "surrogate-0.001"),
    ),
}  # fmt: skip


def load(settings: VRNNSettings, seed: int) -> tuple[Drawings, Drawings]:
    """Drawings to train on and held-out drawings, both standardised by the former."""
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


def learn_from_data(
    vrnn: VRNN, data: Drawings, steps: int, settings: VRNNSettings, label: str, warm_up: bool = True
) -> VRNN:
    """Maximise the ELBO of drawings."""
    turn_on = max(round(settings.warm_up * steps), 1)
    elbo = ELBOObjective(
        TraceMeanField_ELBO(),  # the KL of each z in closed form, given the draws before it
        vrnn.model,
        vrnn.guide,
        weight=1 / (settings.batch * settings.length),
        arguments=lambda x, mask: (len(x), settings.length, x, None if mask.all() else mask),
        latent_weight=linear(0.0, 1.0, turn_on) if warm_up else None,
    )
    batches = batches_of(settings.batch, data.points, data.mask)
    learn(elbo, batches=batches, steps=steps, settings=settings, label=label)
    return vrnn


def compress(student: VRNN, teacher: Any, loss: DistillationLoss, steps: int, settings: VRNNSettings, label: str) -> VRNN:
    """Teach a student what a frozen teacher generates, without data."""
    points = settings.batch * settings.length
    arguments = settings.batch, settings.length
    half = max(steps // 2, 1)
    ramp = linear(0.0, 1.0, half)
    fraction = (lambda step: ramp(max(step - half, 0))) if isinstance(loss, OnPolicyKD) else None
    options = {"weight": 1 / points, "steps": steps, "settings": settings, "label": label, "student_fraction": fraction}
    distil(student.model, teacher, loss, *arguments, **options)
    return student


def fitted_guide(vrnn: VRNN, data: Drawings, seed: int, settings: VRNNSettings, label: str) -> VRNN:
    """A copy of a model whose recognition network is trained anew on data while the generator stays as it is."""
    pyro.set_rng_seed(seed)
    widths = vrnn.generative["points"][0].out_features, vrnn.recurrent, vrnn.generative["latents"][0].in_features
    copy = VRNN(*widths, scale=vrnn.scale).to(settings.device)
    copy.generative.load_state_dict(vrnn.generative.state_dict())
    copy.generative.requires_grad_(False).eval()
    return learn_from_data(copy, data, settings.guide_steps, settings, label, warm_up=False)


@torch.no_grad()
def elbo_of(vrnn: VRNN, data: Drawings, limit: int) -> float:
    """ELBO of the first drawings in nats per point, with one draw of z each."""
    pyro.clear_param_store()
    total = 0.0
    for x, mask in zip(data.points[:limit].split(AT_ONCE), data.mask[:limit].split(AT_ONCE), strict=True):
        total -= TraceMeanField_ELBO().loss(vrnn.model, vrnn.guide, len(x), x.shape[1], x, mask)
    return total / int(data.mask[:limit].sum())


def bound(loss: DistillationLoss, student: VRNN, teacher: Any, settings: VRNNSettings) -> float:
    """A distillation loss in nats per point, averaged over the measured drawings."""
    calls = max(settings.measured // AT_ONCE, 1)
    total = sum(loss.loss(student.model, teacher, AT_ONCE, settings.length) for _ in range(calls))
    return total / (calls * AT_ONCE * settings.length)


@torch.no_grad()
def made_by(model: Callable[..., Tensor], settings: VRNNSettings, like: Drawings) -> Drawings:
    """Drawings that a model makes, standardised like the data and with its lengths, since a model does not end its drawings."""
    calls = max(settings.measured // AT_ONCE, 1)
    points = torch.cat([model(AT_ONCE, settings.length) for _ in range(calls)])
    return Drawings(points, like.mask[torch.arange(len(points), device=points.device) % len(like.mask)], like.scale)


@torch.no_grad()
def end_of_long(model: Callable[..., Tensor], settings: VRNNSettings, scale: Standardisation) -> Drawings:
    """The last points of long drawings that a model makes: as many points as it was trained on, from far beyond them."""
    calls = max(settings.measured // AT_ONCE, 1)
    points = torch.cat([model(AT_ONCE, settings.long)[:, -settings.length :] for _ in range(calls)])
    return Drawings(points, torch.ones(points.shape[:2], dtype=torch.bool), scale)


def run_seed(seed: int, settings: VRNNSettings, place: Place) -> Run:
    """Train and measure the models of one seed."""
    seen, unseen = load(settings, seed)
    passes = settings.epochs * (len(seen) // settings.batch)
    teacher_steps, steps = passes or settings.teacher_steps, passes or settings.steps
    print(f"seed {seed}: {len(seen)} drawings to learn from, {len(unseen)} held out")

    pyro.set_rng_seed(seed)
    teacher = VRNN(settings.teacher_width, settings.teacher_recurrent, settings.latents, settings.scale).to(settings.device)
    names = ("length", "scale", "batch", "warm_up")
    place.trained(
        teacher,
        {"seed": seed, "steps": teacher_steps, "data": fingerprint(seen.points, seen.mask)}
        | {name: getattr(settings, name) for name in names}
        | optimisation(settings),
        lambda: learn_from_data(teacher, seen, teacher_steps, settings, f"seed {seed}: teacher"),
    )
    frozen = freeze(teacher.model)

    pyro.set_rng_seed(seed)
    small = settings.student_width, settings.student_recurrent, settings.latents, settings.scale
    start = VRNN(*small).state_dict()
    models = {TEACHER: teacher}
    for name, loss in [student_named(option, settings.length) for option in settings.students]:
        student = VRNN(*small).to(settings.device)
        student.load_state_dict(start)
        if name.startswith(SELECTED):
            select_weights(student.generative, teacher.generative)
        elif name.startswith(FITTED):
            rows = 2 * settings.batch, settings.length
            fit_layers(student.generative, teacher.generative, student.model, teacher.model, *rows, ridge=0.1)
        label = f"seed {seed}: {name}"
        pyro.set_rng_seed(seed)
        if loss is None:
            models[name] = learn_from_data(student, seen, steps, settings, label)
        else:
            models[name] = compress(student, frozen, loss, steps, settings, label)

    measured: dict[str, dict[str, Any]] = {"data": {}}
    pyro.set_rng_seed(seed + 1000)
    pool = Drawings(seen.points[: settings.measured], seen.mask[: settings.measured], seen.scale)
    references = {"data": features(unseen), "teacher": features(made_by(frozen, settings, seen))}
    made = {"data": features(pool)}
    long = features(end_of_long(frozen, settings, seen.scale)) if settings.long else {}
    for name, vrnn in models.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        made[name] = features(made_by(vrnn.model, settings, seen))
        measured[name] = {"parameters": sum(parameter.numel() for parameter in vrnn.generative.parameters())}
        if long:
            found = distances(features(end_of_long(vrnn.model, settings, seen.scale)), long)
            measured[name] |= {f"{key}/long": value for key, value in found.items()}
        if name != TEACHER:
            pair = (
                paper_loss(targets(settings.length), latent_weight=0.0),
                LocalKD(targets(settings.length), latent_weight=1.0),
            )
            surrogate, local = (bound(loss, vrnn, frozen, settings) for loss in pair)
            measured[name] |= {"surrogate": surrogate, "local": local, "bound": min(surrogate, local)}
        if name in (TEACHER, SCRATCH):
            measured[name]["elbo"] = elbo_of(vrnn, unseen, settings.measured)
        if settings.guide_steps:
            fitted = fitted_guide(vrnn, seen, seed, settings, f"seed {seed}: guide of {name}")
            measured[name]["fitted_elbo"] = elbo_of(fitted, unseen, settings.measured)
    for name, mine in made.items():
        measured[name] |= {
            f"{key}/{kind}": value for kind, theirs in references.items() for key, value in distances(mine, theirs).items()
        }
    pyro.clear_param_store()
    rows = same_noise(models, unseen, seed, settings)
    draw_strokes(rows, place.out / f"strokes-{seed}.png", explain(rows, {"data": "held-out drawings", **WEIGHT}))
    return {
        "models": measured,
        "drawings": [len(seen), len(unseen)],
        "pen": {name: float(mine["pen"].mean()) for name, mine in made.items()},
    }


@torch.no_grad()
def same_noise(
    models: dict[str, VRNN], data: Drawings, seed: int, settings: VRNNSettings, count: int = 10
) -> dict[str, Drawings]:
    """Held-out drawings, and drawings that all the models make from the same noise."""
    pyro.set_rng_seed(seed)
    with record_noise() as noise:
        models[TEACHER].model(count, settings.length)
    rows = {"data": Drawings(data.points[:count], data.mask[:count], data.scale)}
    for name, vrnn in models.items():
        points = replay_noise(vrnn.model, noise=noise)(count, settings.length)
        rows[name] = Drawings(points, torch.ones(points.shape[:2], dtype=torch.bool), data.scale)
    return rows


def tables(runs: list[Run]) -> dict[str, Table]:
    """Likelihoods, and distances against the data and against the teacher."""
    parameters = {name: str(found.get("parameters", "-")) for name, found in runs[0]["models"].items()}
    likelihoods = estimates(runs, ["elbo", "fitted_elbo", "bound", "surrogate", "local"])
    note = explain(runs[0]["models"], {"data": "drawings of the training data", **WEIGHT})
    pens = {name: [over_seeds([run["pen"][name] for run in runs])] for name in runs[0]["pen"]}
    found = {
        "likelihood": Table(
            "Nats per point: held-out ELBO with the model's own guide and with a fitted one; bounds on KL(teacher || student)",
            ["parameters", "ELBO", "ELBO, fitted guide", "smaller bound", "surrogate bound", "local bound"],
            {name: [parameters[name], *row] for name, row in likelihoods.items() if name != "data"},
            note,
        )
    }
    columns = ["pen up", "difference", *FEATURES.values(), "MMD²", "1-NN accuracy"]
    for kind, title in (("data", "held-out data"), ("teacher", "the teacher's drawings")):
        rows: dict[str, Sequence[Any]] = {
            name: [*pens[name], *row]
            for name, row in estimates(runs, [f"{key}/{kind}" for key in ("pen", *FEATURES, "mmd", "neighbour")]).items()
        }
        found[kind] = Table(f"Drawings against {title}", columns, rows, note)
    if "pen/long" in runs[0]["models"][TEACHER]:
        found["long"] = Table(
            "The end of long drawings, against the end of the teacher's",
            columns[1:],
            {
                name: row
                for name, row in estimates(runs, [f"{key}/long" for key in ("pen", *FEATURES, "mmd", "neighbour")]).items()
                if name != "data"
            },
            note,
        )
    return found


EXPERIMENT = Experiment("vrnn", __doc__ or "", PRESETS, run_seed, tables, may_be_zero=("epochs", "guide_steps", "long"))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
