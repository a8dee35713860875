"""The continual step of a conditional VAE: it learns the digits 5 to 9, and holds what the old model knew of 0 to 4."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from examples._experiment import Place, fingerprint
from examples._images import elbo, feature_network, floats, load
from examples._training import batches_of, learn, optimisation, paper_loss, trainer_of
from examples.continual_vae import PRESETS as OF_EXAMPLE
from examples.continual_vae import ContinualSettings, parts_of
from models.conditional_vae import ConditionalVAE
from pyro_kd import SurrogateKD, freeze
from pyro_kd.divergences import wasserstein2
from pyro_kd.losses import DistillationLoss
from pyro_kd.metrics import fid
from pyro_kd.training import DistillationObjective, Objective, Trainer, continual_objectives
from tests.benchmarks.applications.continual import LATENT_WEIGHT, NEW_TASK, OLD_TASK, distillation_by_hand, elbo_by_hand
from tests.benchmarks.time_to_quality.problem import PairedDraws, Problem
from tests.benchmarks.time_to_quality.variants import Variant

__all__ = ["OBJECTIVES", "PRESETS", "build"]

OBJECTIVES = ["paper", "local first"]
PRESETS = {"smoke": OF_EXAMPLE["smoke"], "cpu": replace(OF_EXAMPLE["cpu"], samples=500)}
CLIP_NORM = 200.0
"""As in the example."""


def build(seed: int, settings: ContinualSettings, place: Place) -> Problem:
    """The example's model after the first part, from which the student goes on."""
    everything, rows = load(settings, train=True), settings.rows
    old_images, new_images = parts_of(everything, settings)
    held_out = parts_of(load(settings, train=False), settings)[1].floats()[:200].to(settings.device)
    network = feature_network(everything, place, settings.classifier_epochs, settings.device)
    size, channels = old_images.images.shape[-1], old_images.images.shape[1]

    def blank() -> ConditionalVAE:
        return ConditionalVAE(size, settings.width, 2, channels, settings.latents).to(settings.device)

    def of_data(vae: ConditionalVAE, task: int, warm_up: int) -> Objective:
        return elbo(vae, 1 / rows, warm_up, lambda images: (len(images), task, floats(images, settings.device)))

    def learn_first() -> None:
        learn(
            of_data(old, OLD_TASK, round(settings.warm_up * settings.first_steps)),
            batches=batches_of(rows, old_images.images),
            steps=settings.first_steps,
            settings=settings,
            label=f"seed {seed}: first part",
            clip_norm=CLIP_NORM,
        )

    pyro.set_rng_seed(seed)
    old = blank()
    depends_on = {"seed": seed, "data": fingerprint(old_images.images), **optimisation(settings)}
    depends_on |= {key: getattr(settings, key) for key in ("rows", "first_steps", "warm_up")}
    place.trained(old, depends_on, learn_first)
    old.eval()
    frozen = freeze(old.model)
    share = len(new_images) / (len(new_images) + len(old_images))
    pyro.set_rng_seed(seed)
    paired = PairedDraws(frozen, settings.samples, OLD_TASK)
    features = network.features(paired.teachers)

    def student() -> ConditionalVAE:
        made = blank()
        made.load_state_dict(old.state_dict())
        return made

    def loop_loss(vae: ConditionalVAE, images: Tensor) -> Tensor:
        new = elbo_by_hand(vae, floats(images, settings.device))
        return (share * new + (1 - share) * distillation_by_hand(vae, old, len(images))) / rows

    def with_loss(make: Callable[..., DistillationLoss]) -> Callable[..., Trainer]:
        options: dict[str, Any] = {
            "latent_weight": LATENT_WEIGHT,
            "latent_divergence": wasserstein2,
            "latent_reduction": "mean",
        }

        def trainer(vae: ConditionalVAE, steps: int, variant: Variant) -> Trainer:
            knowledge = DistillationObjective(
                make(["x"], reuse=variant.reuse, **options),
                vae.model,
                frozen,
                weight=1 / rows,
                arguments=lambda images: (len(images), OLD_TASK),
            )
            both = continual_objectives(of_data(vae, NEW_TASK, 0), knowledge, new_share=share)
            return trainer_of(both, steps=steps, settings=replace(settings, compile=variant.compile), clip_norm=CLIP_NORM)

        return trainer

    def measure(vae: ConditionalVAE) -> dict[str, float]:
        made = paired.of(vae.model)
        bound = paired.distance(made) / (2 * vae.scale**2)
        new = TraceMeanField_ELBO().loss(vae.model, vae.guide, len(held_out), NEW_TASK, held_out) / len(held_out)
        return {
            "both": share * new + (1 - share) * bound,
            "bound": bound,
            "fid": fid(network.features(made), features),
            "new": new,
        }

    return Problem(
        sizes=f"width {settings.width}, {size} pixels, {rows} rows",
        settings=settings,
        steps=settings.steps,
        student=student,
        trained=lambda vae: vae.parameters(),
        loop_loss=loop_loss,
        objectives={"local first": with_loss(SurrogateKD), "paper": with_loss(paper_loss)},
        batches=lambda: batches_of(rows, new_images.images),
        measures={
            "both": "both parts, nats",
            "bound": "bound on fresh noise, old part",
            "fid": "FD to the old model",
            "new": "negative ELBO, new part",
        },
        measure=measure,
        clip_norm=CLIP_NORM,
    )
