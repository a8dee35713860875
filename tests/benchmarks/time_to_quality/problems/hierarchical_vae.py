"""The hierarchical VAE of digits at 32 x 32 pixels."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro

from examples._experiment import Place, fingerprint
from examples._images import feature_network, load
from examples._training import distiller_of, optimisation, paper_loss
from examples.hierarchical_vae import PRESETS as OF_EXAMPLE
from examples.hierarchical_vae import HierarchicalSettings, learn_from_data
from models.hierarchical_vae import HierarchicalVAE
from pyro_kd import SurrogateKD, freeze
from pyro_kd.divergences import wasserstein2
from pyro_kd.losses import DistillationLoss
from pyro_kd.metrics import fid
from pyro_kd.training import Trainer, fit_layers, select_weights
from tests.benchmarks.applications.hierarchical_vae import LATENT_WEIGHT, loss_by_hand
from tests.benchmarks.time_to_quality.problem import PairedDraws, Problem

__all__ = ["OBJECTIVES", "PRESETS", "build"]

OBJECTIVES = ["local first", "paper"]
PRESETS = {
    "smoke": OF_EXAMPLE["smoke"],
    "cpu": replace(OF_EXAMPLE["cpu"], paired=500),
    "paper": replace(OF_EXAMPLE["cpu"], paired=500, teacher_width=128, student_width=32),
    # The same for an hour of a CPU, whose teacher has learned for a tenth of the steps.
    "paper-short": replace(OF_EXAMPLE["cpu"], paired=200, teacher_width=128, student_width=32, teacher_steps=150, steps=300),
}


def build(seed: int, settings: HierarchicalSettings, place: Place) -> Problem:
    """The example's teacher, and the student's start."""
    data, rows = load(settings, train=True), settings.rows
    size, channels = data.images.shape[-1], data.images.shape[1]
    network = feature_network(data, place, settings.classifier_epochs, settings.device)

    def new(width: int) -> HierarchicalVAE:
        return HierarchicalVAE(size, width, channels, settings.latents).to(settings.device)

    pyro.set_rng_seed(seed)
    vae = new(settings.teacher_width)
    depends_on = {"seed": seed, "data": fingerprint(data.images), **optimisation(settings)}
    depends_on |= {key: getattr(settings, key) for key in ("rows", "teacher_steps", "warm_up")}
    place.trained(
        vae, depends_on, lambda: learn_from_data(vae, data, settings.teacher_steps, settings, f"seed {seed}: teacher")
    )
    vae.eval()
    teacher = freeze(vae.model)
    pyro.set_rng_seed(seed)
    weights = new(settings.student_width).state_dict()
    paired = PairedDraws(teacher, settings.paired)
    features = network.features(paired.teachers)

    def student() -> HierarchicalVAE:
        made = new(settings.student_width)
        made.load_state_dict(weights)
        return made

    def inherit(student: HierarchicalVAE, steps: int) -> int:
        select_weights(student, vae)
        return 0

    def fit(student: HierarchicalVAE, steps: int) -> int:
        fit_layers(student.top_down, vae.top_down, student.model, vae.model, rows)
        return 0

    def with_loss(make: Callable[..., DistillationLoss]) -> Callable[..., Trainer]:
        divergence: dict[str, Any] = {"latent_divergence": wasserstein2, "latent_reduction": "mean"}
        return lambda student, steps, variant: distiller_of(
            student.model,
            teacher,
            make(["x"], latent_weight=LATENT_WEIGHT, reuse=variant.reuse, **divergence),
            weight=1 / rows,
            steps=steps,
            settings=replace(settings, compile=variant.compile),
            local_steps=steps // 8 if variant.start != "own" else None,
        )

    def measure(student: HierarchicalVAE) -> dict[str, float]:
        made = paired.of(student.model)
        return {"bound": paired.distance(made) / (2 * vae.scale**2), "fid": fid(network.features(made), features)}

    return Problem(
        sizes=f"width {settings.teacher_width} -> {settings.student_width}, {size} pixels, {rows} rows",
        settings=settings,
        steps=settings.steps,
        student=student,
        trained=lambda student: student.top_down.parameters(),
        loop_loss=lambda student, rows: loss_by_hand(student, vae, rows),
        objectives={"local first": with_loss(SurrogateKD), "paper": with_loss(paper_loss)},
        args=(rows,),
        measures={"bound": "bound on fresh noise", "fid": "FD to the teacher"},
        measure=measure,
        inherit=inherit,
        fit=fit,
    )
