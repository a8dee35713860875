"""The Helmholtz machine of Old Faithful. Its KL is exact: all 256 states of the latents are summed, and the two targets lie on a grid."""

import copy
from dataclasses import replace

import pyro
import torch
from torch import Tensor

from examples._experiment import Place, fingerprint
from examples._training import distiller_of, learn, optimisation, paper_loss
from examples.helmholtz import PRESETS as OF_EXAMPLE
from examples.helmholtz import TARGETS, HelmholtzSettings, WakeSleep, dead_perceptrons
from models.helmholtz import HelmholtzMachine
from pyro_kd import LocalKD, MarginalKD, freeze
from pyro_kd.datasets import Standardisation, old_faithful
from pyro_kd.losses import DistillationLoss
from pyro_kd.metrics import marginal_log_prob
from pyro_kd.training import ELBOObjective, Trainer, best_start, fit_layers, select_weights
from tests.benchmarks.applications.helmholtz import loss_by_hand
from tests.benchmarks.time_to_quality.problem import Problem
from tests.benchmarks.time_to_quality.variants import Variant

__all__ = ["OBJECTIVES", "PRESETS", "build"]

OBJECTIVES = ["local", "local, then marginal"]
PRESETS = {"smoke": OF_EXAMPLE["smoke"], "cpu": OF_EXAMPLE["cpu"]}
BOUND_ROWS = 5000
REACH, SIDE = 5.0, 101
"""Of the grid. The density of y1 and y2 has a standard deviation of 0.5 around its means, which is five spacings."""


def build(seed: int, settings: HelmholtzSettings, place: Place) -> Problem:
    """A teacher that learned by wake-sleep, and a student none of whose perceptrons starts dead."""
    minutes = old_faithful().rows
    data = Standardisation.of(minutes)(minutes).to(settings.device)
    rows = len(data)
    pyro.set_rng_seed(seed)
    machine = HelmholtzMachine(settings.teacher_width).to(settings.device)
    depends_on = {"seed": seed, "steps": settings.steps, "data": fingerprint(data), **optimisation(settings)}

    def train_teacher() -> None:
        objective = ELBOObjective(WakeSleep(), machine.model, machine.guide, weight=1 / rows)
        learn(objective, rows, *data.unbind(-1), steps=settings.steps, settings=settings, label=f"seed {seed}: teacher")

    place.trained(machine, depends_on, train_teacher)
    teacher = freeze(machine.model)
    weights = living_start(seed, settings).state_dict()
    side = torch.linspace(-REACH, REACH, SIDE, device=settings.device)
    grid = dict(zip(TARGETS, torch.cartesian_prod(side, side).unbind(-1), strict=True))
    spacing = 2 * REACH / (SIDE - 1)
    with torch.no_grad():
        expected = marginal_log_prob(teacher, grid, SIDE**2).double()

    def student() -> HelmholtzMachine:
        made = HelmholtzMachine(settings.student_width).to(settings.device)
        made.load_state_dict(weights)
        return made

    def inherit(student: HelmholtzMachine, steps: int) -> int:
        """A choice of two units may be a poor one, so that all that have no unit in common compete."""
        made, number = dict[Trainer, HelmholtzMachine](), settings.teacher_width // settings.student_width
        each = max(steps // 50, 1)

        def make() -> Trainer:
            machine_of_units = HelmholtzMachine(settings.student_width).to(settings.device)
            select_weights(machine_of_units, machine, offset=len(made) / number)
            trainer = distiller_of(
                machine_of_units.model,
                teacher,
                local(1),
                weight=1 / rows,
                steps=steps,
                settings=replace(settings, compile=False),
            )
            made[trainer] = machine_of_units
            return trainer

        best = best_start(make, rows, starts=number, steps=each, total_steps=steps, num_samples=3)
        student.load_state_dict(made[best].state_dict())
        return number * each

    def fit(student: HelmholtzMachine, steps: int) -> int:
        """Of all choices that have no unit in common, the one whose layers fit best."""
        made, number = dict[float, dict[str, Tensor]](), settings.teacher_width // settings.student_width
        for k in range(number):
            shares = fit_layers(
                student.generative, machine.generative, student.model, machine.model, 1000, offset=k / number
            )
            made[sum(shares.values())] = copy.deepcopy(student.state_dict())
        student.load_state_dict(made[min(made)])
        return 0

    def local(reuse: int) -> DistillationLoss:
        return LocalKD(TARGETS, reuse=reuse)

    def trainer(student: HelmholtzMachine, steps: int, variant: Variant, exact: bool) -> Trainer:
        turns = {"then": MarginalKD(TARGETS, control_variate=True), "then_from": max(steps // 2, 1)} if exact else {}
        return distiller_of(
            student.model,
            teacher,
            local(variant.reuse),
            weight=1 / rows,
            steps=steps,
            settings=replace(settings, compile=variant.compile),
            **turns,
        )

    def measure(student: HelmholtzMachine) -> dict[str, float]:
        found = marginal_log_prob(student.model, grid, SIDE**2).double()
        bounds = paper_loss(TARGETS, latent_weight=0.0), local(1)
        bound = min(loss.loss(student.model, teacher, BOUND_ROWS) / BOUND_ROWS for loss in bounds)
        return {"kl": float((expected.exp() * (expected - found)).sum() * spacing**2), "bound": bound}

    return Problem(
        sizes=f"width {settings.teacher_width} -> {settings.student_width}, {rows} rows",
        settings=settings,
        steps=settings.steps,
        student=student,
        trained=lambda student: student.generative.parameters(),
        loop_loss=lambda student, rows: loss_by_hand(student, machine, rows),
        objectives={
            "local": lambda *args: trainer(*args, exact=False),
            "local, then marginal": lambda *args: trainer(*args, exact=True),
        },
        args=(rows,),
        measures={"kl": "exact KL", "bound": "bound on fresh noise"},
        measure=measure,
        inherit=inherit,
        fit=fit,
    )


def living_start(seed: int, settings: HelmholtzSettings) -> HelmholtzMachine:
    """The first student of the seed's random stream without a dead perceptron."""
    for index in range(1000):
        pyro.set_rng_seed(1000 * seed + index)
        machine = HelmholtzMachine(settings.student_width)
        if not dead_perceptrons(machine):
            return machine
    raise AssertionError("all starts are dead")
