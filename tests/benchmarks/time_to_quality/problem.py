"""What a comparison needs to know of an application."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples._experiment import Settings
from pyro_kd import freeze, record_noise, replay_noise
from pyro_kd.training import Trainer
from tests.benchmarks.time_to_quality.variants import Variant

__all__ = ["PairedDraws", "Problem"]


@dataclass(frozen=True)
class Problem:
    """A teacher, its students' start, and the two ways to train them.

    Attributes:
        sizes: of networks and batch, in words.
        settings: the optimiser and its schedule, for both ways.
        steps: of the loop.
        student: makes the student, with the same weights each time.
        trained: the student's parameters that learn.
        loop_loss: ``f(student, *args)``, the paper's loss a row in plain PyTorch.
        objectives: by name; ``f(student, steps, variant)`` makes the library's trainer. The first is the advised one.
        batches: makes the batches, which are the arguments of a step; or None.
        args: the arguments of each step, where there are no batches.
        measures: titles of what ``measure`` returns, by name. The first decides; all are the smaller the better.
        measure: ``f(student)``, on a copy in evaluation mode.
        clip_norm: largest norm of the gradient.
        inherit: ``f(student, steps)`` gives a new student, of a run of so many steps, the weights of some of the teacher's units, in its
            place, and returns how many of the steps this took; None where the teacher has no such weights. Its time counts.
        fit: likewise, with layers that are fitted to the teacher's.
    """

    sizes: str
    settings: Settings
    steps: int
    student: Callable[[], nn.Module]
    trained: Callable[[Any], Iterable[Tensor]]
    loop_loss: Callable[..., Tensor]
    objectives: Mapping[str, Callable[[Any, int, Variant], Trainer]]
    measures: Mapping[str, str]
    measure: Callable[[Any], dict[str, float]]
    batches: Callable[[], Iterable[Any]] | None = None
    args: tuple[Any, ...] = ()
    clip_norm: float | None = None
    inherit: Callable[[Any, int], int] | None = None
    fit: Callable[[Any, int], int] | None = None


class PairedDraws:
    """What a teacher makes from some noise, and what students make from the same.

    Args:
        teacher: a frozen program that returns a tensor with one entry a row.
        num: number of rows.
        args: arguments of both programs after the number of rows.
        rows: of a call.
    """

    def __init__(self, teacher: Callable[..., Tensor], num: int, *args: Any, rows: int = 250) -> None:
        self.args = args
        self.noise: list[tuple[int, Any]] = []
        made = []
        with torch.no_grad():
            for start in range(0, num, rows):
                count = min(rows, num - start)
                with record_noise() as noise:
                    made.append(teacher(count, *args))
                self.noise.append((count, noise))
        self.teachers = torch.cat(made)

    @torch.no_grad()
    def of(self, student: Callable[..., Tensor]) -> Tensor:
        """What the student makes, of the shape of ``teachers``."""
        program = freeze(student)
        return torch.cat([replay_noise(program, noise=noise)(count, *self.args) for count, noise in self.noise])

    def distance(self, made: Tensor) -> float:
        """The mean over rows of the squared distance."""
        return float((made - self.teachers).square().flatten(1).sum(1).mean())
