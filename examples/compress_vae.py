"""Compress a whole VAE of handwritten digits without data: its generator, and then its encoder.

    python -m examples.compress_vae                   # three seeds, a few minutes
    python -m examples.compress_vae --preset smoke    # the same in seconds, too short to learn

A teacher learns 1437 of scikit-learn's digits, each pixel made black or white at random by its grey value. A small student
learns from the teacher alone (surrogate, ours), in two stages that never see a digit:

1. the generator, z -> x: surrogate distillation of ``model``, on shared noise;
2. the encoder, x -> z: distillation of ``guide`` on images that the teacher makes. A guide is a program too, with input x
   and target z.

A second student with the same size and initialisation learns from the digits (scratch). Its one objective has as many steps as each
of the two stages. All are measured by the ELBO of the 360 held-out digits. With one latent layer whose prior has no parameters,
local and surrogate distillation are the same, so there is one distilled student.

Written to ``--out``: results.json, digits-SEED.png.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from examples._experiment import Experiment, Place, Settings, fingerprint, run
from examples._methods import SCRATCH, SURROGATE, TEACHER, explain
from examples._pictures import save, subplots
from examples._tables import Estimates, Run, Table, estimates
from examples._training import batches_of, distil, learn, optimisation, paper_loss
from models.vae import VAE
from pyro_kd import freeze, record_noise, replay_noise
from pyro_kd.datasets import digits
from pyro_kd.training import ELBOObjective

PIXELS = 64
HELD_OUT = 360
FIGURES = {
    "elbo": "held-out ELBO",
    "train_elbo": "ELBO of the teacher's digits",
    "bound": "bound on KL(teacher ‖ student)",
    "encoder_kl": "KL of the encoders",
}


@dataclass(frozen=True)
class CompressSettings(Settings):
    """What a run depends on."""

    steps: int = 4000
    teacher_steps: int = 4000
    rows: int = 128
    latents: int = 8
    teacher_hidden: tuple[int, ...] = (256, 256)
    student_hidden: tuple[int, ...] = (32,)
    learning_rate: float = 2e-3
    elbo_samples: int = 50


PRESETS = {
    "smoke": CompressSettings(steps=10, teacher_steps=10, elbo_samples=2),
    "cpu": CompressSettings(),
}


def learn_from_data(vae: VAE, images: Tensor, steps: int, settings: CompressSettings, label: str) -> VAE:
    """Maximise the ELBO of images of shape (n, pixels), whose pixels are made black or white anew in each batch."""

    def black_and_white(batch: Tensor) -> tuple[int, Tensor]:
        return len(batch), batch.bernoulli()

    elbo = ELBOObjective(Trace_ELBO(), vae.model, vae.guide, weight=1 / settings.rows, arguments=black_and_white)
    learn(elbo, batches=batches_of(settings.rows, images), steps=steps, settings=settings, label=label)
    return vae


def compress(student: VAE, model: Any, guide: Any, settings: CompressSettings, label: str) -> VAE:
    """Teach a student the two programs of a frozen teacher, without data."""
    rows = settings.rows
    options: dict[str, Any] = {"weight": 1 / rows, "steps": settings.steps, "settings": settings}
    distil(student.model, model, paper_loss(["x"]), rows, label=f"{label}: generator", **options)
    distil(
        student.guide,
        guide,
        paper_loss(["z"]),
        rows,
        arguments=lambda rows: (rows, images_of(model, rows)),
        label=f"{label}: encoder",
        **options,
    )
    return student


def images_of(model: Any, rows: int) -> Tensor:
    """Images that a model makes, with black and white pixels; shape (rows, pixels)."""
    with torch.no_grad():
        return model(rows).bernoulli()


def elbo_of(vae: VAE, x: Tensor, samples: int) -> float:
    """ELBO of images x of shape (n, pixels), in nats per image, averaged over images and draws of z."""
    loss = Trace_ELBO(num_particles=samples, vectorize_particles=True, max_plate_nesting=1)
    return -loss.loss(vae.model, vae.guide, len(x), x) / len(x)


def run_seed(seed: int, settings: CompressSettings, place: Place) -> Run:
    """Train and measure the three autoencoders of one seed."""
    seen, unseen = digits().split(HELD_OUT, seed)
    pixels = seen.images.reshape(-1, PIXELS)
    x = unseen.images.reshape(-1, PIXELS).bernoulli().to(settings.device)
    x_seen = pixels.bernoulli().to(settings.device)
    start = VAE(PIXELS, settings.latents, settings.student_hidden).state_dict()

    def small() -> VAE:
        vae = VAE(PIXELS, settings.latents, settings.student_hidden).to(settings.device)
        vae.load_state_dict(start)
        return vae

    teacher = VAE(PIXELS, settings.latents, settings.teacher_hidden).to(settings.device)
    depends_on = {"seed": seed, "data": fingerprint(pixels), "steps": settings.teacher_steps, "rows": settings.rows}
    depends_on |= optimisation(settings)
    seconds = place.trained(
        teacher,
        depends_on,
        lambda: learn_from_data(teacher, pixels, settings.teacher_steps, settings, f"seed {seed}: teacher"),
    )
    pyro.set_rng_seed(seed)
    model, guide = freeze(teacher.model), freeze(teacher.guide)
    vaes = {
        TEACHER: teacher,
        SCRATCH: learn_from_data(small(), pixels, settings.steps, settings, f"seed {seed}: {SCRATCH}"),
        SURROGATE: compress(small(), model, guide, settings, f"seed {seed}: {SURROGATE}"),
    }

    measured: dict[str, dict[str, Any]] = {}
    for name, vae in vaes.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        measured[name] = {
            "parameters": [sum(p.numel() for p in part.parameters()) for part in (vae.decoder, vae.encoder)],
            "elbo": elbo_of(vae, x, settings.elbo_samples),
            "train_elbo": elbo_of(vae, x_seen, settings.elbo_samples),
        }
        if name != TEACHER:
            rows, made = 5000, images_of(model, 5000)
            measured[name]["bound"] = paper_loss(["x"], latent_weight=0.0).loss(vae.model, model, rows) / rows
            measured[name]["encoder_kl"] = paper_loss(["z"]).loss(vae.guide, guide, rows, made) / rows
    draw_digits(vaes, unseen.images, place.out / f"digits-{seed}.png", settings.device)
    return {"models": measured, "teacher_seconds": seconds}


def tables(runs: list[Run]) -> dict[str, Table]:
    """The figures, in nats per image."""
    sizes = {name: " + ".join(map(str, model["parameters"])) for name, model in runs[0]["models"].items()}
    rows: dict[str, Estimates] = {name: [sizes[name], *row] for name, row in estimates(runs, list(FIGURES)).items()}
    title = "Nats per image; each seed has its own teacher and its own split of the data"
    return {"figures": Table(title, ["parameters, generator + encoder", *FIGURES.values()], rows, explain(rows))}


@torch.no_grad()
def draw_digits(vaes: dict[str, VAE], images: Tensor, path: Path, device: str, columns: int = 12) -> None:
    """Draw held-out digits with their reconstructions, and images that the models make from the same noise."""
    pyro.set_rng_seed(0)
    x = images[:columns].reshape(columns, PIXELS).bernoulli().to(device)
    left = {"held-out digits": images[:columns], "made black and white": x}
    right: dict[str, Tensor] = {}
    with record_noise() as noise:
        vaes[TEACHER].model(columns)
    for name, vae in vaes.items():
        left[name] = vae.decoder(vae.encoder(x).chunk(2, -1)[0]).sigmoid()
        right[name] = replay_noise(vae.model, noise=noise)(columns)
    figure, (one, two) = subplots(1, 2, figsize=(13, 3.2), width_ratios=[1, 1])
    for ax, rows, title in ((one, left, "reconstructed from the mean code"), (two, right, "made from the same noise")):
        grids = [row.reshape(columns, 8, 8).cpu() for row in rows.values()]
        frame = torch.stack([torch.nn.functional.pad(grid, (1, 1, 1, 1), value=0.5) for grid in grids])
        ax.imshow(frame.permute(0, 2, 1, 3).reshape(len(grids) * 10, columns * 10).numpy(), cmap="gray_r", vmin=0, vmax=1)
        ax.set_yticks([10 * i + 4.5 for i in range(len(grids))], list(rows))
        ax.set_xticks([])
        ax.set_title(title)
    save(figure, path, explain(vaes))


EXPERIMENT = Experiment("compress_vae", __doc__ or "", PRESETS, run_seed, tables)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
