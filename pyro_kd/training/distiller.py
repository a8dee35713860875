"""Distillation without writing the loop: a trainer of one student and one teacher, and of more objectives if there are some."""

from collections.abc import Callable, Mapping
from typing import Any

from pyro_kd.errors import InvalidProgramError
from pyro_kd.losses import DistillationLoss
from pyro_kd.training.distillation_objective import DistillationObjective
from pyro_kd.training.objectives import Objective, Schedule
from pyro_kd.training.optimisers import Optimiser
from pyro_kd.training.trainer import Trainer

__all__ = ["Distiller"]


class Distiller(Trainer):
    """Trains a student to imitate a teacher.

    Args:
        student: the program whose parameters are trained.
        teacher: usually a frozen program, ``pyro_kd.freeze(model)``.
        optim: a function that makes a torch optimiser from a list of parameters, or a torch or Pyro optimiser.
        loss: :class:`~pyro_kd.SurrogateKD`, :class:`~pyro_kd.LocalKD`, or a different distillation loss.
        weight: factor of the loss among the objectives: a number, or a function of the step.
        latent_weight: schedule for the weight of the loss's latent terms: a function of the step.
        teacher_forcing: schedule for the loss's ``teacher_forcing``: a function of the step, such as
            :func:`~pyro_kd.training.linear` or :func:`~pyro_kd.training.switch`.
        student_fraction: schedule for the ``student_fraction`` of :class:`~pyro_kd.OnPolicyKD`: likewise.
        local_steps: where the loss leaves teacher forcing open, the number of first steps with local distillation; None for a quarter
            of the steps of the first fit.
        reuse: how many steps each draw of the teacher serves, so that the teacher runs once in so many steps: docs/teacher_cache.md.
            None for what the loss says.
        teacher_device: where the teacher runs, if it is not where the student is, such as ``"cuda:1"``: docs/several_processes.md.
        arguments: makes the programs' arguments from those of a step, see :class:`~pyro_kd.training.DistillationObjective`.
        objectives: what else is minimised, by name: for continual learning the ELBO of the new data.
        **options: see :class:`~pyro_kd.training.Trainer`: ``scheduler``, ``clip_norm``, ``accumulate``, ``device``, ``log_every``.

    Raises:
        InvalidProgramError: ``loss`` is no distillation loss, or a program is not callable.
        MissingDeviceError: there is no such device.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd import Distiller, SurrogateKD
        >>> def student(rows):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("rows", rows):
        ...         pyro.sample("x", dist.Normal(loc, 1.0))
        >>> def teacher(rows):
        ...     with pyro.plate("rows", rows):
        ...         pyro.sample("x", dist.Normal(3.0, 1.0))
        >>> pyro.clear_param_store()
        >>> distiller = Distiller(student, teacher, lambda params: torch.optim.SGD(params, lr=0.01), SurrogateKD(["x"]))
        >>> history = distiller.fit(10, steps=100, progress=False)
        >>> round(pyro.param("loc").item(), 3), round(history["loss"][0], 3)
        (3.0, 45.0)

        Continual learning, with batches x of new data::

            teacher = freeze(vae.model)
            distiller = Distiller(
                vae.model, teacher, lambda params: torch.optim.Adam(params, lr=1e-3), SurrogateKD(["x"]),
                arguments=lambda x: (len(x),),
                objectives={"new": ELBOObjective(Trace_ELBO(), vae.model, vae.guide, arguments=lambda x: (len(x), x))},
            )
            distiller.fit(batches=loader, steps=5000)
    """

    def __init__(
        self,
        student: Callable[..., Any],
        teacher: Callable[..., Any],
        optim: Optimiser,
        loss: DistillationLoss,
        *,
        weight: Schedule = 1.0,
        latent_weight: Callable[[int], Any] | None = None,
        teacher_forcing: Callable[[int], Any] | None = None,
        student_fraction: Callable[[int], Any] | None = None,
        local_steps: int | None = None,
        reuse: int | None = None,
        teacher_device: Any = None,
        arguments: Callable[..., tuple[Any, ...]] | None = None,
        objectives: Mapping[str, Objective] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(loss, DistillationLoss):
            raise InvalidProgramError(
                f"loss is {loss!r:.60}, which is no distillation loss such as SurrogateKD(targets=[...]) or LocalKD(targets=[...]). "
                "The order is Distiller(student, teacher, optim, loss). For an ELBO: Trainer(ELBOObjective(elbo, model, guide), "
                "optim)."
            )
        main = DistillationObjective(
            loss,
            student,
            teacher,
            weight=weight,
            arguments=arguments,
            latent_weight=latent_weight,
            teacher_forcing=teacher_forcing,
            student_fraction=student_fraction,
            local_steps=local_steps,
            reuse=reuse,
            teacher_device=teacher_device,
        )
        super().__init__({"distillation": main, **(objectives or {})}, optim, **options)
