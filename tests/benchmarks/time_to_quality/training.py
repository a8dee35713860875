"""One run: a student trained in one way, measured at checkpoints, with the clock stopped."""

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyro
import torch
from torch import nn

from pyro_kd.capture.background import is_compiling
from pyro_kd.training import Callback
from pyro_kd.utils.randomness import keeping_random_state
from tests.benchmarks.time_to_quality.clock import Clock
from tests.benchmarks.time_to_quality.problem import Problem
from tests.benchmarks.time_to_quality.variants import Variant

__all__ = ["checkpoints_of", "compile_all", "train"]


def checkpoints_of(steps: int) -> list[int]:
    """The steps after which the student is measured: sixteen equal distances, and closer ones in the beginning."""
    geometric = {round(steps ** (i / 16)) for i in range(17)}
    linear = {round(steps * i / 16) for i in range(1, 17)}
    return sorted({step for step in geometric | linear if step == 1 or step >= steps / 64})


def train(problem: Problem, variant: Variant, seed: int) -> dict[str, Any]:
    """Train a new student.

    Args:
        problem: the application.
        variant: how.
        seed: of the noise and of the order of the batches.

    Returns:
        ``steps``, ``wall``, ``cpu``, lists with an entry for each checkpoint, and ``values``, such lists by the name of a measure.
    """
    pyro.clear_param_store()
    student = problem.student()
    steps = max(round(variant.share * problem.steps), 1)
    points: list[tuple[int, float, float, dict[str, float]]] = []
    at = set(checkpoints_of(steps))
    pyro.set_rng_seed(seed)
    clock = Clock()

    def checkpoint(step: int) -> None:
        if step not in at and points:
            return
        seconds = clock.seconds()
        with clock.paused(), keeping_random_state(), pyro.get_param_store().scope(), torch.no_grad():
            pyro.set_rng_seed(12345)
            points.append((step, *seconds, problem.measure(copy.deepcopy(student).eval())))

    spent = start(problem, variant, student, steps)
    checkpoint(spent)
    if variant.who == "loop":
        by_hand(problem, student, steps - spent, lambda step: checkpoint(spent + step))
    else:
        trainer = problem.objectives[variant.objective](student, steps - spent, variant)
        batches = None if problem.batches is None else problem.batches()
        with warnings.catch_warnings():
            # It would be measured as captured.
            warnings.filterwarnings("error", message=".*(continues without a graph|not compiled in the background)")
            trainer.fit(
                *problem.args,
                batches=batches,
                steps=steps - spent,
                progress=False,
                callbacks=[_Checkpoints(checkpoint, spent)],
            )
    numbers, wall, cpu, values = zip(*points, strict=True)
    measured = {name: [found[name] for found in values] for name in problem.measures}
    return {"steps": list(numbers), "wall": list(wall), "cpu": list(cpu), "values": measured}


def start(problem: Problem, variant: Variant, student: Any, steps: int) -> int:
    """Give a student its start, and return the number of steps that this took."""
    if variant.start == "own":
        return 0
    give = problem.inherit if variant.start == "teacher" else problem.fit
    if give is None:
        raise ValueError(f"{problem.sizes}: the teacher has no weights to start from")
    spent = give(student, steps)
    if spent >= steps:
        raise ValueError(f"the start takes {spent} of {steps} steps: take more steps, or a larger share of them")
    pyro.clear_param_store()
    return spent


def compile_all(problem: Problem, variant: Variant, *, steps: int = 32) -> None:
    """Train for some steps, and wait in each until nothing is being compiled: the cache then has every graph of the variant."""
    pyro.clear_param_store()
    trainer = problem.objectives[variant.objective](problem.student(), steps, variant)
    batches = None if problem.batches is None else problem.batches()
    trainer.fit(*problem.args, batches=batches, steps=steps, progress=False, callbacks=[_Patience()])


class _Patience(Callback):
    def on_step(self, trainer: Any, row: Mapping[str, float]) -> None:
        while is_compiling():
            time.sleep(0.1)


class _Checkpoints(Callback):
    def __init__(self, checkpoint: Callable[[int], None], spent: int) -> None:
        self.checkpoint, self.spent = checkpoint, spent

    def on_step(self, trainer: Any, row: Mapping[str, float]) -> None:
        self.checkpoint(self.spent + int(row["step"]))


def by_hand(problem: Problem, student: nn.Module, steps: int, checkpoint: Callable[[int], None]) -> None:
    """The loop as one writes it for one model."""
    params, settings = list(problem.trained(student)), problem.settings
    optim = torch.optim.Adam(params, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps) if settings.cosine else None
    for step, args in zip(range(1, steps + 1), calls(problem), strict=False):
        problem.loop_loss(student, *args).backward()
        if problem.clip_norm is not None:
            nn.utils.clip_grad_norm_(params, problem.clip_norm)
        optim.step()
        if schedule is not None:
            schedule.step()
        optim.zero_grad()
        checkpoint(step)


def calls(problem: Problem) -> Iterator[Any]:
    """The arguments of each step, without an end."""
    batches: Iterable[Any] = [problem.args] if problem.batches is None else problem.batches()
    while True:
        yield from batches
