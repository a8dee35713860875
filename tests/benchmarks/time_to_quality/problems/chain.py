"""The real-valued chain of depth 20, whose KL is a product of transition matrices. Its teacher needs no training."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro

from examples._chain_laws import kl_of_laws, normal_law
from examples._experiment import Place
from examples._training import distiller_of, paper_loss
from examples.error_accumulation import PRESETS as OF_EXAMPLE
from examples.error_accumulation import ErrorAccumulationSettings
from models.chains import NormalChain, NormalStudent
from pyro_kd import LocalKD, SurrogateKD, freeze
from pyro_kd.losses import DistillationLoss
from pyro_kd.training import Trainer
from tests.benchmarks.applications.chain import loss_by_hand
from tests.benchmarks.time_to_quality.problem import Problem

__all__ = ["OBJECTIVES", "PRESETS", "build"]

TARGETS = ["y"]
OBJECTIVES = ["local first", "paper"]
PRESETS = {
    "smoke": replace(OF_EXAMPLE["smoke"], normal_layers=(3,), grid=401),
    "cpu": replace(OF_EXAMPLE["cpu"], normal_layers=(20,), grid=801),
}


def build(seed: int, settings: ErrorAccumulationSettings, place: Place) -> Problem:
    """The chain, and a student as torch initialises it."""
    (layers,), rows = settings.normal_layers, settings.rows
    pyro.set_rng_seed(seed)
    chain, start = NormalChain(layers, settings.power, settings.scale), NormalStudent(layers, settings.width, settings.scale)
    law, weights = normal_law(chain, settings.grid, settings.reach), start.state_dict()
    teacher = freeze(chain.to(settings.device).model)

    def student() -> NormalStudent:
        made = NormalStudent(layers, settings.width, settings.scale).to(settings.device)
        made.load_state_dict(weights)
        return made

    def with_loss(make: Callable[..., DistillationLoss], **options: Any) -> Callable[..., Trainer]:
        return lambda student, steps, variant: distiller_of(
            student.model,
            teacher,
            make(TARGETS, reuse=variant.reuse, **options),
            weight=1 / rows,
            steps=steps,
            settings=replace(settings, compile=variant.compile),
        )

    def measure(student: NormalStudent) -> dict[str, float]:
        bounds = paper_loss(TARGETS, latent_weight=0.0), LocalKD(TARGETS)
        number = settings.sample_rows
        bound = min(loss.loss(student.model, teacher, number) / number for loss in bounds)
        return {
            "kl": kl_of_laws(law, normal_law(copy.deepcopy(student).cpu(), settings.grid, settings.reach)),
            "bound": bound,
        }

    return Problem(
        sizes=f"{layers} layers, width {settings.width}, {rows} rows",
        settings=settings,
        steps=settings.steps,
        student=student,
        trained=lambda student: student.networks.parameters(),
        loop_loss=lambda student, rows: loss_by_hand(student, chain, rows),
        objectives={"local first": with_loss(SurrogateKD), "paper": with_loss(paper_loss, latent_weight=1.0)},
        args=(rows,),
        measures={"kl": "exact KL", "bound": "bound on fresh noise"},
        measure=measure,
    )
