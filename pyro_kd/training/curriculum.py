"""Objectives that take turns: one loss for the first steps, the next one after that."""

from collections.abc import Callable, Mapping
from typing import Any

from pyro_kd.losses import DistillationLoss
from pyro_kd.training.distillation_objective import DistillationObjective
from pyro_kd.training.objectives import Program
from pyro_kd.training.schedules import require_whole, switching_at

__all__ = ["in_turn"]


def in_turn(
    student: Program,
    teacher: Program,
    losses: Mapping[int, DistillationLoss],
    *,
    weight: float = 1.0,
    arguments: Callable[..., tuple[Any, ...]] | None = None,
) -> dict[str, DistillationObjective]:
    """One distillation after the other, for a :class:`~pyro_kd.training.Trainer`, with one optimiser and one history.

    Local distillation learns fast, and an objective that sees what the layers do together, such as
    :class:`~pyro_kd.MultiSampleKD`, finds a good student only from a good start. Only the loss whose turn it is costs time.
    Validation losses are those of the last one. Where a turn ends, the optimiser starts anew, as
    :class:`~pyro_kd.training.Trainer` says.

    Args:
        student: the program whose parameters are trained.
        teacher: usually a frozen program.
        losses: the step from which each loss is minimised -> the loss. One of the steps is 0.
        weight: factor of all losses.
        arguments: as for :class:`~pyro_kd.training.DistillationObjective`.

    Returns:
        The objectives by the name of their loss's class, in the order of their turns.

    Raises:
        ValueError: no loss starts at step 0, or a step is negative.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd import LocalKD, MultiSampleKD
        >>> from pyro_kd.training import Trainer, in_turn
        >>> def coins(rows, logits):
        ...     with pyro.plate("rows", rows):
        ...         z = pyro.sample("z", dist.Bernoulli(0.5))
        ...         pyro.sample("y", dist.Bernoulli(logits=logits[z.long()]))
        >>> def student(rows):
        ...     coins(rows, pyro.param("logits", torch.zeros(2)))
        >>> def teacher(rows):
        ...     coins(rows, torch.tensor([-1.0, 2.0]))
        >>> pyro.clear_param_store()
        >>> losses = {0: LocalKD(["y"]), 100: MultiSampleKD(["y"], num_samples=8)}
        >>> objectives = in_turn(student, teacher, losses, weight=1 / 200)
        >>> trainer = Trainer(objectives, lambda params: torch.optim.Adam(params, lr=0.05))
        >>> history = trainer.fit(200, steps=200, progress=False)
        >>> list(objectives)
        ['LocalKD', 'MultiSampleKD']
    """
    for start in losses:
        require_whole(start, "the step at which a loss starts")
    if not isinstance(weight, int | float):
        raise TypeError(f"weight must be a number, not {weight!r:.40}: each turn has it, and 0 outside of its turn")
    if 0 not in losses or min(losses) < 0:
        raise ValueError(
            f"the losses start at the steps {sorted(losses)}, but one must start at step 0 and none before: "
            "in_turn(student, teacher, {0: LocalKD(...), 1000: MultiSampleKD(...)})"
        )
    starts = sorted(losses)
    objectives = dict[str, DistillationObjective]()
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        loss = losses[start]
        kind = type(loss).__name__
        name = f"{kind} from step {start}" if kind in objectives else kind
        turn = _turn(weight, start, end)
        objectives[name] = DistillationObjective(
            loss, student, teacher, weight=turn, arguments=arguments, settles_at=starts[-1]
        )
    return objectives


def _turn(weight: float, start: int, end: int | None) -> Callable[[int], float]:
    borders = [start] if end is None else [start, end]
    return switching_at(borders, lambda step: weight if step >= start and (end is None or step < end) else 0.0)
