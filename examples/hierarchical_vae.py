"""Compress the generator of a hierarchical VAE of images without data: the paper's Table 1, Fig. 6 and Fig. 7.

    python -m examples.hierarchical_vae                       # the embedded digits at 32 x 32
    python -m examples.hierarchical_vae --data images-npz --data-root cifar10.npz
    python -m examples.hierarchical_vae --preset paper --data cifar10 --data-root FOLDER --device cuda
    python -m examples.hierarchical_vae --study sweep --out results/sweep    # student widths and weights of the latent loss
    python -m examples.hierarchical_vae --preset smoke        # in seconds, too short to learn

A teacher learns the data by its ELBO. Students with the same size and initialisation learn for the same number of steps: from the
data, by their own ELBO (scratch), or from the frozen teacher's generator alone, by local distillation (local) or by surrogate
distillation (surrogate, ours), each with several latent divergences and weights. The means of the pixels are compared: with those of
the teacher, on noise that the student did not share, and with the test data, on features of a small classifier trained on the labels.

The paper preset has the paper's sizes, batch, learning rate and losses, and its 50 epochs of CIFAR-10; different data needs
``--steps`` and ``--teacher-steps`` for its epochs. The cosine decay, and the clipping of the ELBOs' gradients, are not the paper's.

Written to ``--out``: results.json, samples-SEED.png (all from the same noise; a red frame marks a digit that changed), sweep.png.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from examples._experiment import DataSettings, Experiment, Place, fingerprint, run
from examples._images import (
    MEASURES,
    FeatureNetwork,
    bits_per_dimension,
    distances,
    elbo,
    feature_network,
    floats,
    generate,
    generate_both,
    load,
)
from examples._methods import FORCED, LOCAL, SCRATCH, SELECTED, SURROGATE, TEACHER, explain
from examples._pictures import save, subplots
from examples._tables import Run, Table, estimates
from examples._training import batches_of, distil, learn, optimisation, paper_loss
from models.hierarchical_vae import HierarchicalVAE
from pyro_kd import LocalKD, SurrogateKD, freeze, record_noise, replay_noise
from pyro_kd.datasets import Images
from pyro_kd.divergences import kl, wasserstein2
from pyro_kd.losses import DistillationLoss
from pyro_kd.training import select_weights


@dataclass(frozen=True)
class Recipe:
    """A distillation loss: the paper's is the W2² averaged over the dimensions of a layer, with weight 0.1."""

    method: Callable[..., DistillationLoss]
    divergence: Callable[..., Tensor] = wasserstein2
    reduction: str = "mean"
    weight: float = 0.1
    selects: bool = False

    def loss(self) -> DistillationLoss:
        """The loss; its target x is always summed over pixels."""
        return self.method(
            ["x"], latent_weight=self.weight, latent_divergence=self.divergence, latent_reduction=self.reduction
        )

    @property
    def name(self) -> str:
        """The name in the file of a student."""
        method = "local first" if self.method is SurrogateKD else self.method.__name__
        return f"{method} {self.divergence.__name__} {self.reduction} {self.weight:g}{' selected' * self.selects}"


RECIPES = {
    f"{LOCAL}, mean W2², 0.1": Recipe(LocalKD),
    f"{LOCAL}, summed W2², 1": Recipe(LocalKD, reduction="sum", weight=1.0),
    f"{LOCAL}, summed KL, 1": Recipe(LocalKD, kl, "sum", 1.0),
    f"{SURROGATE}, mean W2², 0.1": Recipe(paper_loss),
    f"{SURROGATE}, mean W2², 10": Recipe(paper_loss, weight=10.0),
    f"{SURROGATE}, summed KL, 1": Recipe(paper_loss, kl, "sum", 1.0),
    f"{SURROGATE}, no latent loss": Recipe(paper_loss, weight=0.0),
    f"{FORCED}, mean W2², 0.1": Recipe(SurrogateKD),
    f"{FORCED}, no latent loss": Recipe(SurrogateKD, weight=0.0),
    f"{SELECTED}, mean W2², 0.1": Recipe(SurrogateKD, selects=True),
}
"""For local distillation the weight changes little: no two stages share parameters, and Adam's steps depend on the scale of a
gradient only through weight decay."""
MEANINGS = {
    "W2²": "the squared 2-Wasserstein distance of a latent layer, averaged or summed over its dimensions",
    "the number": "multiplies the latent terms",
}


@dataclass(frozen=True)
class HierarchicalSettings(DataSettings):
    """Sizes and lengths; the defaults are the ``cpu`` preset.

    Attributes:
        image_size: of faces; images of other data keep their size.
        study: ``quality`` compares the methods, ``sweep`` the widths of the student and the weights of the latent loss.
        warm_up: share of the steps over which the KL of an ELBO is turned on.
        recipes: the distilled students of the study of quality, by name.
        paired: images made from the same noise by teacher and student.
    """

    data: str = "digits"
    image_size: int = 64
    study: str = "quality"
    teacher_width: int = 32
    student_width: int = 8
    latents: int = 16
    rows: int = 32
    teacher_steps: int = 1500
    steps: int = 1000
    warm_up: float = 0.3
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    samples: int = 2000
    paired: int = 1000
    recipes: tuple[str, ...] = tuple(RECIPES)
    classifier_epochs: int = 6
    sweep_widths: tuple[int, ...] = (4, 8, 16)
    sweep_weights: tuple[float, ...] = (0.0, 0.01, 0.1, 1.0, 10.0)


PRESETS = {
    "smoke": HierarchicalSettings(
        teacher_width=8, student_width=4, latents=4, rows=8, teacher_steps=4, steps=4, samples=40, paired=20, classifier_epochs=1,
        sweep_widths=(4,), sweep_weights=(0.1,),
    ),
    "cpu": HierarchicalSettings(),
    "paper": HierarchicalSettings(
        data="cifar10", teacher_width=128, student_width=32, rows=128, teacher_steps=19_500, steps=19_500, warm_up=0.5,
        learning_rate=1e-4, samples=10_000, sweep_widths=(4, 8, 16, 32, 64),
    ),
}  # fmt: skip


def learn_from_data(vae: HierarchicalVAE, data: Images, steps: int, settings: HierarchicalSettings, label: str) -> None:
    """Maximise the ELBO of images."""
    warm_up = round(settings.warm_up * steps)
    objective = elbo(vae, 1 / settings.rows, warm_up, lambda images: (len(images), floats(images, settings.device)))
    batches = batches_of(settings.rows, data.images)
    learn(objective, batches=batches, steps=steps, settings=settings, label=label, clip_norm=200.0)


def run_seed(seed: int, settings: HierarchicalSettings, place: Place) -> Run:
    """Train and measure the students of one seed."""
    data = load(settings, train=True)
    test = load(settings, train=False)
    size, channels = data.images.shape[-1], data.images.shape[1]
    network = feature_network(data, place, settings.classifier_epochs, settings.device)
    features = network.features

    def new(width: int) -> HierarchicalVAE:
        return HierarchicalVAE(size, width, channels, settings.latents).to(settings.device)

    pyro.set_rng_seed(seed)
    vae = new(settings.teacher_width)
    depends_on = {"seed": seed, "data": fingerprint(data.images), **optimisation(settings)}
    depends_on |= {key: getattr(settings, key) for key in ("rows", "teacher_steps", "warm_up")}
    teacher_seconds = place.trained(
        vae, depends_on, lambda: learn_from_data(vae, data, settings.teacher_steps, settings, f"seed {seed}: teacher")
    )
    vae.to(settings.device)
    teacher = freeze(vae.model)
    pyro.set_rng_seed(seed)
    from_teacher = features(generate(teacher, settings.samples))
    real = features(test.floats()[: settings.samples])
    starts = {width: new(width).state_dict() for width in {settings.student_width, *settings.sweep_widths}}
    x = floats(test.images[:200], settings.device)

    def measure(name: str, vae: HierarchicalVAE, with_guide: bool) -> dict[str, float]:
        pyro.set_rng_seed(seed + 1000)
        program = freeze(vae.model)
        made = features(generate(program, settings.samples))
        found = {"parameters": float(sum(p.numel() for p in vae.top_down.parameters()))}
        found |= {f"teacher/{key}": value for key, value in distances(made, from_teacher).items()}
        found |= {f"data/{key}": value for key, value in distances(made, real).items()}
        if name != TEACHER:
            rows = min(200, settings.samples)
            found["bound"] = paper_loss(["x"], latent_weight=0.0).loss(program, teacher, rows) / rows
            found["local_bound"] = LocalKD(["x"]).loss(program, teacher, rows) / rows
            ours, original = generate_both(program, teacher, settings.paired)
            found["distance"] = float((ours - original).square().flatten(1).sum(1).mean())
            found["same_class"] = 100 * float((network.classify(ours) == network.classify(original)).double().mean())
        if with_guide:
            objective = elbo(vae, 1.0, 0, lambda: (len(x), x))
            vae.eval()
            with torch.no_grad():
                found["bits"] = bits_per_dimension(objective.value(0, (), {}).item() / len(x), vae)
        return found

    def student(name: str, width: int, recipe: Recipe | None) -> None:
        """Distil a student, or train it on the data; students are cached as teachers are."""
        pyro.set_rng_seed(seed)
        small, label = new(width), f"seed {seed}: {name}"
        small.load_state_dict(starts[width])
        of_student = {
            "steps": settings.steps,
            "teacher": settings.teacher_width,
            "recipe": recipe.name if recipe else "ELBO",
            "start": (settings.samples, settings.student_width, settings.sweep_widths),  # what was drawn before it
        }

        def train() -> None:
            if recipe is None:
                learn_from_data(small, data, settings.steps, settings, label)
            else:
                if recipe.selects:
                    select_weights(small.top_down, vae.top_down)
                distil(
                    small.model,
                    teacher,
                    recipe.loss(),
                    settings.rows,
                    weight=1 / settings.rows,
                    steps=settings.steps,
                    settings=settings,
                    label=label,
                    local_steps=settings.steps // 8 if recipe.selects else None,
                )

        seconds = place.trained(small, depends_on | of_student, train)
        students[name] = small.to(settings.device).eval()
        measured[name] = measure(name, small, with_guide=recipe is None) | {"seconds": seconds}

    students: dict[str, HierarchicalVAE] = {}
    measured = {TEACHER: measure(TEACHER, vae.eval(), with_guide=True)}
    if settings.study == "quality":
        student(SCRATCH, settings.student_width, None)
        for name in settings.recipes:
            student(name, settings.student_width, RECIPES[name])
        best = {}  # of each method
        for name in sorted(students, key=lambda name: measured[name]["teacher/fid"]):
            if name.split(",")[0] not in best:
                best[name.split(",")[0]] = name
        draw_kept(
            teacher,
            {best[method]: students[best[method]] for method in (SCRATCH, LOCAL, SURROGATE, FORCED) if method in best},
            measured,
            network if data.labels.ndim == 1 else None,
            place.out / f"samples-{seed}.png",
        )
    else:
        for title, method in ((LOCAL, LocalKD), (SURROGATE, paper_loss)):
            for width in settings.sweep_widths:
                student(f"{title}, width {width}", width, Recipe(method))
        for weight in settings.sweep_weights:  # local distillation hardly depends on it, see RECIPES
            student(f"{SURROGATE}, weight {weight:g}", settings.student_width, Recipe(paper_loss, weight=weight))
    return {"models": measured, "teacher_seconds": teacher_seconds, "study": settings.study}


def tables(runs: list[Run]) -> dict[str, Table]:
    """Against the teacher, against the data, and the bounds."""
    titles = list(MEASURES.values())
    bounds = {
        "bound": "surrogate bound, nats",
        "local_bound": "local bound, nats",
        "bits": "negative ELBO, bits per dimension",
        "seconds": "seconds of training",
    }
    note = explain(runs[0]["models"], MEANINGS if runs[0]["study"] == "quality" else None)
    sizes = {name: str(int(model["parameters"])) for name, model in runs[0]["models"].items()}
    return {
        "teacher": Table(
            "Against the teacher's images; the last two on the same noise",
            [*titles, "squared distance", "same class, %"],
            estimates(runs, [*(f"teacher/{key}" for key in MEASURES), "distance", "same_class"]),
            note,
        ),
        "data": Table("Against the test images", titles, estimates(runs, [f"data/{key}" for key in MEASURES]), note),
        "bounds": Table(
            "Bounds on KL(teacher || student) per image; negative ELBO (density of pixels from 0 to 1) for models with an encoder",
            ["parameters of the generator", *bounds.values()],
            {name: [sizes[name], *row] for name, row in estimates(runs, list(bounds)).items()},
            note,
        ),
    }


def draw_kept(
    teacher: Any,
    students: Mapping[str, HierarchicalVAE],
    measured: Mapping[str, Mapping[str, float]],
    network: FeatureNetwork | None,
    path: Path,
    columns: int = 10,
) -> None:
    """Draw what teacher and students make from the same noise, and mark where the class is another one: the paper's Fig. 6.

    Args:
        teacher: the program.
        students: by name.
        measured: the figures of each.
        network: the classifier, or None. With it, column c has the first of the teacher's images that it takes for class c.
        path: of the picture.
        columns: the number of images of each.
    """
    pyro.set_rng_seed(0)
    with torch.no_grad():
        with record_noise() as noise:
            rows = {TEACHER: teacher(200).cpu()}
        for name, vae in students.items():
            rows[name] = replay_noise(freeze(vae.model), noise=noise)(200).cpu()
    classes = {name: network.classify(images) for name, images in rows.items()} if network else {}
    chosen = list(range(columns))
    if network:
        found = [(classes[TEACHER] == label).nonzero() for label in range(columns)]
        chosen = [int(first[0]) for first in found if len(first)]
    figure, axes = subplots(len(rows), len(chosen), figsize=(0.75 * len(chosen) + 2.2, 0.8 * len(rows) + 0.5), squeeze=False)
    for (name, images), line in zip(rows.items(), axes, strict=True):
        same = "" if name == TEACHER else f"\nsame class: {measured[name]['same_class']:.0f} %"
        label = f"{name}\n{measured[name]['parameters']:,.0f} parameters{same if network else ''}"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for ax, number in zip(line, chosen, strict=True):
            ax.imshow(images[number].permute(1, 2, 0).clamp(0, 1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            is_kept = not network or bool(classes[name][number] == classes[TEACHER][number])
            ax.spines[:].set(color="0.8" if is_kept else "crimson", linewidth=0.8 if is_kept else 2.5)
    marks = {"red frame": "a classifier takes the image for another class than the teacher's"} if network else {}
    save(figure, path, "All images of a column are made from the same noise. " + explain(rows, MEANINGS | marks), dpi=90)


def draw(runs: list[Run], out: Path) -> None:
    """Draw the distance to the teacher against the width of the student and the weight: the paper's Fig. 7."""
    if runs[0]["study"] != "sweep":
        return
    found = {name: cells[0] for name, cells in estimates(runs, ["teacher/fid"]).items()}
    figure, axes = subplots(1, 2, figsize=(8, 3.8), sharey=True)
    for method, varied, ax in ((LOCAL, "width", axes[0]), (SURROGATE, "width", axes[0]), (SURROGATE, "weight", axes[1])):
        prefix = f"{method}, {varied} "
        names = [name for name in found if name.startswith(prefix)]
        ax.errorbar(
            [name.removeprefix(prefix) for name in names],
            [found[name].mean for name in names],
            [found[name].standard_error if len(runs) > 1 else 0.0 for name in names],
            label=method,
            color="#e07a2f" if method == LOCAL else "#1b4965",
            marker="s" if method == LOCAL else "o",
            capsize=3,
        )
    axes[0].set(xlabel="width of the student", ylabel="FID to the teacher")
    axes[1].set(xlabel="weight of the latent loss (mean W2²)")
    axes[0].legend(frameon=False)
    save(figure, out / "sweep.png", explain([LOCAL, SURROGATE]))


EXPERIMENT = Experiment("hierarchical_vae", __doc__ or "", PRESETS, run_seed, tables, draw)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
