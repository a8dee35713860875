"""How the experiments train: :func:`learn` from data, and :func:`distil` from a teacher.

Both use Adam with the settings' learning rate and weight decay; with ``settings.cosine`` the learning rate falls to 0 along half a
cosine. Both start and end with an empty parameter store, so that no model is given the parameters of a different one.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from examples._experiment import Settings
from pyro_kd import Distiller, SurrogateKD
from pyro_kd.losses import DistillationLoss
from pyro_kd.losses.targets import Targets
from pyro_kd.training import Objective, Trainer, in_turn

__all__ = ["batches_of", "distil", "distiller_of", "learn", "optimisation", "paper_loss", "trainer_of"]


def learn(
    objectives: Objective | Mapping[str, Objective],
    *args: Any,
    steps: int,
    settings: Settings,
    label: str,
    batches: Iterable[Any] | None = None,
    clip_norm: float | None = None,
) -> Trainer:
    """Minimise the objectives of data.

    Args:
        objectives: one, or several by name, all at once.
        *args: arguments of every step, where there are no batches.
        steps: number of optimisation steps.
        settings: the optimiser, the device, and whether to compile.
        label: of the progress bar.
        batches: the arguments of each step.
        clip_norm: largest norm of the gradient; None for no limit.

    Returns:
        The trainer, with its history.
    """
    pyro.clear_param_store()
    trainer = trainer_of(objectives, steps=steps, settings=settings, clip_norm=clip_norm)
    trainer.fit(*args, batches=batches, steps=steps, progress=label)
    pyro.clear_param_store()
    return trainer


def trainer_of(
    objectives: Objective | Mapping[str, Objective], *, steps: int, settings: Settings, clip_norm: float | None = None
) -> Trainer:
    """What :func:`learn` trains with, before its first step; arguments as there."""
    return Trainer(objectives, clip_norm=clip_norm, **_options(settings, steps))


def distil(
    student: Callable[..., Any],
    teacher: Callable[..., Any],
    loss: DistillationLoss,
    *args: Any,
    steps: int,
    label: str,
    batches: Iterable[Any] | None = None,
    **options: Any,
) -> Trainer:
    """Train a student program on what a frozen teacher program does.

    Args:
        student, teacher, loss, steps: see :func:`distiller_of`.
        *args: arguments of both programs, where there are no batches.
        label: of the progress bar.
        batches: the arguments of each step.
        **options: the other arguments of :func:`distiller_of`.

    Returns:
        The trainer, with its history.
    """
    pyro.clear_param_store()
    distiller = distiller_of(student, teacher, loss, steps=steps, **options)
    distiller.fit(*args, batches=batches, steps=steps, progress=label)
    pyro.clear_param_store()
    return distiller


def distiller_of(
    student: Callable[..., Any],
    teacher: Callable[..., Any],
    loss: DistillationLoss,
    *,
    weight: float,
    steps: int,
    settings: Settings,
    arguments: Callable[..., tuple[Any, ...]] | None = None,
    objectives: Mapping[str, Objective] | None = None,
    teacher_forcing: Callable[[int], float] | None = None,
    student_fraction: Callable[[int], float] | None = None,
    local_steps: int | None = None,
    then: DistillationLoss | None = None,
    then_from: int = 0,
) -> Trainer:
    """What :func:`distil` trains with, before its first step.

    Args:
        student: the program that is trained.
        teacher: a frozen program.
        loss: the distillation loss.
        weight: of the loss: 1 / rows makes it a mean over rows.
        steps: number of optimisation steps.
        settings: the optimiser, the device, and whether to compile.
        arguments: a function from the arguments of a step to those of the programs.
        objectives: what is minimised as well, by name.
        teacher_forcing, student_fraction: schedules for these options of the loss.
        local_steps: first steps with local distillation, where the loss leaves that open; None for the library's default.
        then: a loss that takes the place of the first one at step ``then_from``.
    """
    if then is not None:
        turns = in_turn(student, teacher, {0: loss, then_from: then}, weight=weight, arguments=arguments)
        return Trainer({**turns, **(objectives or {})}, **_options(settings, steps))
    return Distiller(
        student,
        teacher,
        loss=loss,
        weight=weight,
        arguments=arguments,
        objectives=objectives,
        teacher_forcing=teacher_forcing,
        student_fraction=student_fraction,
        local_steps=local_steps,
        **_options(settings, steps),
    )


def paper_loss(targets: Targets, *, latent_weight: float = 0.1, **options: Any) -> SurrogateKD:
    """The loss of the paper: latents are functions of the noise throughout, and their terms have a weight."""
    return SurrogateKD(targets, latent_weight=latent_weight, teacher_forcing=0.0, **options)


def batches_of(rows: int, *tensors: Tensor) -> DataLoader[Any]:
    """Shuffled batches of ``rows`` rows of tensors; a last batch with fewer rows is dropped."""
    return DataLoader(TensorDataset(*tensors), batch_size=rows, shuffle=True, drop_last=True)


def optimisation(settings: Settings) -> dict[str, Any]:
    """The settings of the optimiser: trained weights depend on them (:meth:`~examples._experiment.Place.trained`)."""
    return {name: getattr(settings, name) for name in ("learning_rate", "weight_decay", "cosine")}


def _options(settings: Settings, steps: int) -> dict[str, Any]:
    """The options that all trainers share."""

    def adam(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=settings.learning_rate, weight_decay=settings.weight_decay)

    def cosine(optim: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)

    return {
        "optim": adam,
        "scheduler": cosine if settings.cosine else None,
        "device": settings.device,
        "compile": settings.compile,
    }
