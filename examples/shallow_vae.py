"""Can a hierarchical VAE of two layers replace one of five?

    python -m examples.shallow_vae                    # three seeds
    python -m examples.shallow_vae --preset smoke     # the same in seconds, too short to learn

The teacher is that of examples/hierarchical_vae.py, and the students have two latent layers. Which layers of the teacher they are
paired with is decided by a measurement: the noise of one layer is drawn anew, and the first table shows how far the image moves. The
student's upper layer is paired with z5, with which the program starts, and its lower one with the layer that moves the image most, at
the same resolution (--keep; ``site_map`` names the pairs). The noise of the other layers is left out (``fresh``). For comparison,
students are paired with z5 and z4, which hardly move the image (--keep-instead).

Written to ``--out``: results.json, samples-SEED.png (images of all models from the same noise).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from examples._experiment import Experiment, Place, fingerprint, run
from examples._images import MEASURES, distances, feature_network, generate, load
from examples._methods import FORCED, LOCAL, SCRATCH, SURROGATE, TEACHER, explain
from examples._pictures import save_grid
from examples._tables import Run, Table, estimates
from examples._training import distil, optimisation, paper_loss
from examples.hierarchical_vae import HierarchicalSettings, learn_from_data
from models.hierarchical_vae import HierarchicalVAE
from pyro_kd import LocalKD, SurrogateKD, freeze, record_noise, replay_noise
from pyro_kd.divergences import wasserstein2
from pyro_kd.losses import DistillationLoss

MEANINGS = {
    "lambda": "multiplies the latent terms (mean W2²); 0.1 if none is given",
    "two numbers": "the layers of the teacher that the student's two are paired with",
}


@dataclass(frozen=True)
class ShallowSettings(HierarchicalSettings):
    """Sizes and lengths; the defaults are the ``cpu`` preset.

    Attributes:
        keep: the layers of the teacher that the two layers of a student are paired with, from the top down.
        keep_instead: the same for comparison.
    """

    steps: int = 600
    keep: tuple[int, ...] = (5, 2)
    keep_instead: tuple[int, ...] = (5, 4)


PRESETS = {
    "smoke": ShallowSettings(
        teacher_width=8, student_width=4, latents=4, rows=8, teacher_steps=4, steps=4, samples=40, classifier_epochs=1,
    ),
    "cpu": ShallowSettings(),
    "paper": ShallowSettings(
        data="cifar10", teacher_width=128, student_width=32, rows=128, teacher_steps=19_500, steps=19_500, warm_up=0.5,
        learning_rate=1e-4, samples=10_000,
    ),
}  # fmt: skip


def pairs_of(keep: Sequence[int], layers: int = 5) -> dict[str, Any]:
    """The options ``site_map`` and ``fresh`` of a loss whose student has as many layers as are kept, from the top down."""
    site_map = {f"z{len(keep) - i}": f"z{layer}" for i, layer in enumerate(keep)}
    return {"site_map": site_map, "fresh": [f"z{layer}" for layer in range(layers, 0, -1) if layer not in keep]}


def sides_of(keep: Sequence[int], size: int) -> tuple[int, ...]:
    """The resolutions of the kept layers of a VAE of images with this side."""
    return tuple(1 if layer == 5 else size // 2**layer for layer in keep)


@torch.no_grad()
def moved_by(teacher: Callable[..., Tensor], fresh: Sequence[str], rows: int) -> float:
    """How far images of a program move where the noise of these sites is drawn anew: the mean squared distance per image."""
    with record_noise() as noise:
        images = teacher(rows)
    again = replay_noise(teacher, noise=noise, fresh=[*fresh, "x"])(rows)
    return float((images - again).square().flatten(1).sum(1).mean())


def run_seed(seed: int, settings: ShallowSettings, place: Place) -> Run:
    """Train the teacher, measure its layers, train and measure the students."""
    data, test = load(settings, train=True), load(settings, train=False)
    size, channels = data.images.shape[-1], data.images.shape[1]
    features = feature_network(data, place, settings.classifier_epochs, settings.device).features
    pyro.set_rng_seed(seed)
    vae = HierarchicalVAE(size, settings.teacher_width, channels, settings.latents).to(settings.device)
    depends_on = {"seed": seed, "data": fingerprint(data.images), **optimisation(settings)}
    depends_on |= {key: getattr(settings, key) for key in ("rows", "teacher_steps", "warm_up")}
    steps = settings.teacher_steps
    place.trained(vae, depends_on, lambda: learn_from_data(vae, data, steps, settings, f"seed {seed}: teacher"))
    teacher = freeze(vae.to(settings.device).model)
    pyro.set_rng_seed(seed)
    rows = min(200, settings.samples)
    layers = {f"z{layer}": {"moved": moved_by(teacher, [f"z{layer}"], rows)} for layer in range(5, 0, -1)}
    from_teacher, real = features(generate(teacher, settings.samples)), features(test.floats()[: settings.samples])
    shown = {"test data": test.floats()[:12]}
    pyro.set_rng_seed(0)
    with torch.no_grad(), record_noise() as noise:
        shown[TEACHER] = teacher(12).cpu()
    measured: dict[str, dict[str, float]] = {}

    def measure(name: str, program: Any, pairs: Mapping[str, Any] | None, parameters: int) -> None:
        pyro.set_rng_seed(seed + 1000)
        made = features(generate(program, settings.samples))
        measured[name] = {"parameters": float(parameters)}
        measured[name] |= {f"teacher/{key}": value for key, value in distances(made, from_teacher).items()}
        measured[name] |= {f"data/{key}": value for key, value in distances(made, real).items()}
        if pairs is None:
            return
        with torch.no_grad():
            with record_noise() as recorded:
                theirs = teacher(rows)
            ours = replay_noise(program, noise=recorded, site_map=pairs["site_map"], fresh=["x"])(rows)
            shown[name] = replay_noise(program, noise=noise, site_map=pairs["site_map"], fresh=["x"])(12).cpu()
        measured[name]["distance"] = float((theirs - ours).square().flatten(1).sum(1).mean())
        measured[name]["bound"] = paper_loss(["x"], latent_weight=0.0, **pairs).loss(program, teacher, rows) / rows

    measure(TEACHER, teacher, None, sum(p.numel() for p in vae.top_down.parameters()))
    for keep in (settings.keep, settings.keep_instead):
        pairs, which = pairs_of(keep), ", " + " ".join(map(str, keep))
        options: dict[str, Any] = {"latent_divergence": wasserstein2, "latent_reduction": "mean", **pairs}
        losses: dict[str, DistillationLoss | None] = {
            f"{SCRATCH}{which}": None,
            f"{LOCAL}{which}": LocalKD(["x"], latent_weight=0.1, **options),
            f"{SURROGATE}{which}": paper_loss(["x"], latent_weight=0.1, **options),
            f"{FORCED}{which}": SurrogateKD(["x"], latent_weight=0.1, **options),
        }
        for name, loss in losses.items():
            pyro.set_rng_seed(seed)
            student = HierarchicalVAE(size, settings.student_width, channels, settings.latents, sides=sides_of(keep, size))
            student.to(settings.device)
            label = f"seed {seed}, VAE: {name}"
            if loss is None:
                learn_from_data(student, data, settings.steps, settings, label)
            else:
                one = {"weight": 1 / settings.rows, "steps": settings.steps, "settings": settings, "label": label}
                distil(student.model, teacher, loss, settings.rows, **one)
            count = sum(p.numel() for p in student.top_down.parameters())
            measure(name, freeze(student.eval().model), pairs, count)
    save_grid(shown, place.out / f"samples-{seed}.png", explain(shown, MEANINGS), columns=12)
    return {"models": measured, "layers": {"models": layers}}


def tables(runs: list[Run]) -> dict[str, Table]:
    """The layers of the teacher; the students against the teacher, and against the data."""
    names = runs[0]["models"]
    note = explain(names, MEANINGS)
    further = {"distance": "squared distance on shared noise", "bound": "surrogate bound, nats"}
    sizes = {name: str(int(figures["parameters"])) for name, figures in names.items()}
    teacher = estimates(runs, [*(f"teacher/{key}" for key in MEASURES), *further])
    return {
        "layers": Table(
            "How far images of the teacher move where the noise of one layer is drawn anew",
            ["mean squared distance per image"],
            estimates([run["layers"] for run in runs], ["moved"]),
        ),
        "teacher": Table(
            "Five layers into two: against the teacher's images",
            ["parameters of the generator", *MEASURES.values(), *further.values()],
            {name: [sizes[name], *row] for name, row in teacher.items()},
            note,
        ),
        "data": Table(
            "The same against the test images",
            list(MEASURES.values()),
            estimates(runs, [f"data/{key}" for key in MEASURES]),
            note,
        ),
    }


EXPERIMENT = Experiment("shallow_vae", __doc__ or "", PRESETS, run_seed, tables)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
