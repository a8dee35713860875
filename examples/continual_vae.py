"""Learn two parts of a data set one after the other, with one conditional hierarchical VAE: the paper's continual learning.

    python -m examples.continual_vae                         # digits 0 to 4, then 5 to 9
    python -m examples.continual_vae --data images-npz --data-root cifar10.npz
    python -m examples.continual_vae --preset paper --data celeba --data-root FOLDER --attribute Male --device cuda
    python -m examples.continual_vae --preset smoke          # in seconds, too short to learn

A VAE with a code for the task learns the first part by its ELBO (task 0). Then the first part is gone. Copies of the VAE learn the
second part (task 1) by their ELBO, with weight r, the share of the new data. With weight 1 - r they hold what the old model knew of
task 0: by surrogate distillation (surrogate, ours), by local distillation (local), by the ELBO on images of the old model (CURL), by
that ELBO and the old posterior on the images (LGM), or not at all (fine-tuned). Measured on the held-out images of both parts: the
distance of what the model makes in a task from the images of its part, on features of a classifier trained on the labels, and the
ELBO.

Two losses can be very large here: the KL between narrow latents (summed KL), and that between narrow posteriors (LGM). The paper
preset has the paper's sizes, batch and learning rate and about its number of steps; cosine decay and clipping are not the paper's.

Written to ``--out``: results.json, samples-SEED.png (what each model makes in both tasks, from the same noise).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from examples._experiment import DataSettings, Experiment, Place, fingerprint, run
from examples._images import MEASURES, bits_per_dimension, distances, elbo, feature_network, floats, generate, load
from examples._methods import LOCAL, SURROGATE, explain
from examples._pictures import save_grid
from examples._tables import Run, Table, estimates
from examples._training import batches_of, learn, optimisation, paper_loss
from models.conditional_vae import ConditionalVAE
from pyro_kd import LocalKD, freeze, record_noise, replay_noise
from pyro_kd.datasets import Images
from pyro_kd.divergences import kl, wasserstein2
from pyro_kd.training import (
    DistillationObjective,
    Objective,
    Replay,
    continual_objectives,
    generative_replay,
    lifelong_replay,
)

PARTS = ("old", "new")
BEFORE, FINE_TUNED = "before", "fine-tuned"
MEANINGS = {
    BEFORE: "the model after the first part, from which all others go on",
    FINE_TUNED: "learns the second part by its ELBO alone",
    "CURL": "learns by the ELBO on the second part and on images of the old model",
    "LGM": "like CURL, and holds the old posterior on these images",
    "W2²": "the squared 2-Wasserstein distance of a latent layer, averaged or summed over its dimensions",
    "the number": "multiplies the latent terms",
}


@dataclass(frozen=True)
class ContinualSettings(DataSettings):
    """Sizes and lengths; the defaults are the ``cpu`` preset.

    Attributes:
        image_size: of faces; images of other data keep their size.
        old_classes: the classes of the first part, for data with classes.
        attribute: for data with attributes: images without this attribute are the first part.
        warm_up: share of the first steps over which the KL of the ELBO is turned on.
    """

    data: str = "digits"
    image_size: int = 32
    old_classes: tuple[int, ...] = (0, 1, 2, 3, 4)
    attribute: str = ""
    width: int = 8
    latents: int = 16
    rows: int = 32
    first_steps: int = 1000
    steps: int = 400
    warm_up: float = 0.3
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    samples: int = 1000
    classifier_epochs: int = 6
    methods: tuple[str, ...] = (
        FINE_TUNED,
        f"{LOCAL}, mean W2², 0.1",
        f"{LOCAL}, mean W2², 10",
        f"{LOCAL}, summed W2², 1",
        f"{LOCAL}, summed KL, 1",
        "CURL",
        "CURL, noisy images",
        "LGM",
        "LGM, W2²",
        f"{SURROGATE}, mean W2², 0.1",
        f"{SURROGATE}, mean W2², 10",
        f"{SURROGATE}, summed W2², 1",
        f"{SURROGATE}, summed KL, 1",
    )


PRESETS = {
    "smoke": ContinualSettings(width=4, latents=4, rows=8, first_steps=3, steps=3, samples=30, classifier_epochs=1),
    "cpu": ContinualSettings(),
    "paper": ContinualSettings(
        data="celeba",
        attribute="Male",
        warm_up=0.5,
        width=64,
        rows=256,
        first_steps=20_000,
        steps=200_000,
        learning_rate=1e-4,
        samples=10_000,
    ),
}


def old_knowledge(
    vae: ConditionalVAE, model: Callable[..., Tensor], guide: Callable[..., Any], rows: int
) -> Mapping[str, Objective | None]:
    """The ways to hold what the old model knew, by method; the arguments of a step are images of the new part."""
    weight = 1 / rows
    means = Replay(  # images without noise of the pixels, as they are shown and measured
        lambda num: pyro.deterministic("mean", model(num, 0)),
        ["mean"],
        lambda values, images: (len(images), 0, values["mean"]),
        lambda images: (len(images),),
    )
    draws = Replay(
        model,
        ["x"],
        lambda values, images: (len(images), 0, values["x"]),
        lambda images: (len(images), 0),
    )

    def distilled(method: Any, divergence: Any, reduction: str, latent_weight: float) -> Objective:
        loss = method(["x"], latent_weight=latent_weight, latent_divergence=divergence, latent_reduction=reduction)
        return DistillationObjective(loss, vae.model, model, weight=weight, arguments=lambda images: (len(images), 0))

    likelihood = TraceMeanField_ELBO()
    return {
        FINE_TUNED: None,
        f"{LOCAL}, mean W2², 0.1": distilled(LocalKD, wasserstein2, "mean", 0.1),
        f"{LOCAL}, mean W2², 10": distilled(LocalKD, wasserstein2, "mean", 10.0),
        f"{LOCAL}, summed W2², 1": distilled(LocalKD, wasserstein2, "sum", 1.0),
        f"{LOCAL}, summed KL, 1": distilled(LocalKD, kl, "sum", 1.0),
        "CURL": generative_replay(likelihood, vae.model, vae.guide, means, weight=weight),
        "CURL, noisy images": generative_replay(likelihood, vae.model, vae.guide, draws, weight=weight),
        "LGM": lifelong_replay(likelihood, vae.model, vae.guide, guide, means, weight=weight),
        "LGM, W2²": lifelong_replay(likelihood, vae.model, vae.guide, guide, means, weight=weight, divergence=wasserstein2),
        f"{SURROGATE}, mean W2², 0.1": distilled(paper_loss, wasserstein2, "mean", 0.1),
        f"{SURROGATE}, mean W2², 10": distilled(paper_loss, wasserstein2, "mean", 10.0),
        f"{SURROGATE}, summed W2², 1": distilled(paper_loss, wasserstein2, "sum", 1.0),
        f"{SURROGATE}, summed KL, 1": distilled(paper_loss, kl, "sum", 1.0),
    }


def parts_of(data: Images, settings: ContinualSettings) -> tuple[Images, Images]:
    """The first and the second part, by class or by attribute."""
    if settings.attribute:
        if settings.attribute not in data.classes or data.labels.ndim != 2:
            raise SystemExit(f"--attribute {settings.attribute}: the data has {', '.join(data.classes)}")
        is_old = data.labels[:, data.classes.index(settings.attribute)] == 0
    elif data.labels.ndim != 1:
        raise SystemExit("the data has attributes and no classes: name one attribute, such as --attribute Male")
    else:
        is_old = torch.isin(data.labels, torch.tensor(settings.old_classes))
    return data.where(is_old), data.where(~is_old)


def run_seed(seed: int, settings: ContinualSettings, place: Place) -> Run:
    """Learn the first part, and then the second by each method."""
    everything = load(settings, train=True)
    old, new = parts_of(everything, settings)
    tests = dict(zip(PARTS, parts_of(load(settings, train=False), settings), strict=True))
    network = feature_network(everything, place, settings.classifier_epochs, settings.device)
    real = {part: network.features(test.floats()[: settings.samples]) for part, test in tests.items()}
    size, channels = old.images.shape[-1], old.images.shape[1]

    def blank() -> ConditionalVAE:
        return ConditionalVAE(size, settings.width, 2, channels, settings.latents).to(settings.device)

    def new_data(vae: ConditionalVAE, task: int, warm_up: int) -> Objective:
        return elbo(vae, 1 / settings.rows, warm_up, lambda images: (len(images), task, floats(images, settings.device)))

    pyro.set_rng_seed(seed)
    first = blank()
    depends_on = {"seed": seed, "data": fingerprint(old.images), **optimisation(settings)}
    depends_on |= {key: getattr(settings, key) for key in ("rows", "first_steps", "warm_up")}
    warm_up = round(settings.warm_up * settings.first_steps)

    def learn_part(objectives: Any, part: Images, steps: int, name: str) -> None:
        batches = batches_of(settings.rows, part.images)
        learn(objectives, batches=batches, steps=steps, settings=settings, label=f"seed {seed}: {name}", clip_norm=200.0)

    seconds = place.trained(
        first, depends_on, lambda: learn_part(new_data(first, 0, warm_up), old, settings.first_steps, "first part")
    )
    first.to(settings.device)
    model, guide = freeze(first.model), freeze(first.guide)

    def measure(vae: ConditionalVAE) -> dict[str, float]:
        pyro.set_rng_seed(seed + 1000)
        found = {}
        with torch.no_grad(), poutine.block():
            for task, (part, test) in enumerate(tests.items()):
                made = network.features(generate(vae.model, settings.samples, task))
                found |= {f"{part}/{key}": value for key, value in distances(made, real[part]).items()}
                x = floats(test.images[:200], settings.device)
                nats = TraceMeanField_ELBO().loss(vae.model, vae.guide, len(x), task, x) / len(x)
                found[f"{part}/bits"] = bits_per_dimension(nats, vae)
        return found

    vaes = {BEFORE: first}
    measured = {BEFORE: measure(first)}
    share = len(new) / (len(new) + len(old))
    for name in settings.methods:
        pyro.set_rng_seed(seed)
        vae = blank()
        vae.load_state_dict(first.state_dict())
        knowledge = old_knowledge(vae, model, guide, settings.rows)[name]
        objective = new_data(vae, 1, 0)
        objectives = objective if knowledge is None else continual_objectives(objective, knowledge, new_share=share)
        place.trained(
            vae,
            depends_on | {"then": fingerprint(new.images), "steps": settings.steps, "method": name},
            lambda objectives=objectives, name=name: learn_part(objectives, new, settings.steps, name),
        )
        vae.to(settings.device)
        vaes[name], measured[name] = vae, measure(vae)
    draw_samples(vaes, tests, place.out / f"samples-{seed}.png")
    return {"models": measured, "teacher_seconds": seconds}


def tables(runs: list[Run]) -> dict[str, Table]:
    """The columns old and new, for what is made and for the ELBO."""
    keys = [f"{part}/{key}" for key in MEASURES for part in PARTS]
    titles = [f"{title}, {part}" for title in MEASURES.values() for part in PARTS]
    bits = [f"{part}/bits" for part in PARTS]
    note = explain(runs[0]["models"], MEANINGS)
    return {
        "samples": Table(
            "What is made in each task, against the held-out images of its part", titles, estimates(runs, keys), note
        ),
        "elbo": Table(
            "Negative ELBO of held-out images (density of pixels from 0 to 1), bits per dimension",
            ["old", "new"],
            estimates(runs, bits),
            note,
        ),
    }


@torch.no_grad()
def draw_samples(vaes: Mapping[str, ConditionalVAE], tests: Mapping[str, Images], path: Path, columns: int = 10) -> None:
    """Draw images of both parts, and what each model makes in both tasks from the same noise."""
    pyro.set_rng_seed(0)
    rows = {"test data": torch.cat([test.floats()[:columns] for test in tests.values()])}
    num = 64  # only the first images are shown, but batch norm takes the statistics of all
    with poutine.block():
        with record_noise() as noise:
            next(iter(vaes.values())).model(num, 0)
        for name, vae in vaes.items():
            made = [replay_noise(vae.model, noise=noise)(num, task) for task in (0, 1)]
            rows[name] = torch.cat([images[:columns].cpu() for images in made])
    save_grid(rows, path, explain(rows, MEANINGS), columns=2 * columns)


EXPERIMENT = Experiment("continual_vae", __doc__ or "", PRESETS, run_seed, tables, may_be_zero=("old_classes",))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
