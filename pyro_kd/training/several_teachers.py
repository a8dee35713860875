"""The objectives of a student with several teachers: the loss to each of them, averaged."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from pyro_kd.errors import InvalidProgramError
from pyro_kd.losses import DistillationLoss
from pyro_kd.training.distillation_objective import DistillationObjective
from pyro_kd.training.objectives import Program

__all__ = ["averaged_objectives"]


def averaged_objectives(
    loss: DistillationLoss,
    student: Program,
    teachers: Sequence[Program],
    *,
    weights: Sequence[float] | None = None,
    arguments: Callable[..., tuple[Any, ...]] | None = None,
    latent_weight: Callable[[int], Any] | None = None,
) -> dict[str, DistillationObjective]:
    r"""The average of a loss over several teachers, as objectives of a :class:`~pyro_kd.training.Trainer`.

    .. math:: L = \sum_k \pi_k \, L(p_k, p_\theta)

    Each step runs all teachers, each with its own noise and its own pairs of sites. With the KL, and with p the mixture of the
    teachers with weights :math:`\pi_k`,

    .. math:: \sum_k \pi_k \, KL(p_k \| p_\theta) = KL(p \| p_\theta) + \sum_k \pi_k \, KL(p_k \| p),

    so that a student without latents learns the mixture, as from :func:`~pyro_kd.mixture_of`, whose losses have more variance. With
    :func:`~pyro_kd.divergences.reverse_kl` the optimum is the product of experts instead, the normalised geometric mean
    :math:`\prod_k p_k^{\pi_k}`: what all teachers find probable.

    Args:
        loss: the loss, of which each objective has a copy.
        student: the program whose parameters are trained.
        teachers: frozen programs.
        weights: :math:`\pi_k` up to a factor; None: all the same.
        arguments, latent_weight: as for :class:`~pyro_kd.training.DistillationObjective`.

    Returns:
        The objectives by name: ``"teacher 0"``, ``"teacher 1"`` and so on.

    Raises:
        InvalidProgramError: there are no teachers, or the weights do not fit them.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd import SurrogateKD
        >>> from pyro_kd.training import Trainer, averaged_objectives
        >>> def normal(loc):
        ...     return lambda: pyro.sample("y", dist.Normal(loc, 1.0))
        >>> def student():
        ...     pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
        >>> pyro.clear_param_store()
        >>> objectives = averaged_objectives(SurrogateKD(["y"]), student, [normal(1.0), normal(3.0)])
        >>> trainer = Trainer(objectives, lambda params: torch.optim.SGD(params, lr=0.5))
        >>> history = trainer.fit(steps=20, progress=False)
        >>> round(pyro.param("loc").item(), 3)
        2.0
    """
    numbers = [1.0] * len(teachers) if weights is None else [float(weight) for weight in weights]
    if not teachers or len(numbers) != len(teachers) or min(numbers) < 0 or not 0 < sum(numbers) < float("inf"):
        raise InvalidProgramError(
            f"the average needs at least one teacher, and a weight for each, none below 0 and not all 0: there are {len(teachers)} "
            f"teachers and the weights {weights!r:.60}"
        )
    return {
        f"teacher {k}": DistillationObjective(
            copy.copy(loss),
            student,
            teacher,
            weight=numbers[k] / sum(numbers),
            arguments=arguments,
            latent_weight=latent_weight,
        )
        for k, teacher in enumerate(teachers)
    }
