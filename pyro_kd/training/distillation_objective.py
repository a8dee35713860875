"""The objective of a distillation: a distillation loss between a student, which is trained, and a teacher."""

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
from pyro import poutine
from torch import Tensor

from pyro_kd.errors import InvalidProgramError
from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.isolation.programs import owners
from pyro_kd.losses import DistillationLoss
from pyro_kd.losses.advising import advice_of
from pyro_kd.losses.reuse import DrawPool, checked_reuse
from pyro_kd.losses.teacher_draws import StoredTeacher, call_of
from pyro_kd.losses.terms import SiteTerms
from pyro_kd.sites.tracing import params_of
from pyro_kd.teachers.on_device import on_device, place_of
from pyro_kd.training.batches import Call
from pyro_kd.training.devices import device_of_process
from pyro_kd.training.fingerprint import Fingerprint
from pyro_kd.training.kept_draws import require_storable, warn_of_few_draws
from pyro_kd.training.objectives import Evaluated, Objective, Program
from pyro_kd.training.schedules import switches
from pyro_kd.utils.advice import Advice
from pyro_kd.utils.devices import require_device
from pyro_kd.utils.display import name_of
from pyro_kd.utils.pyro_internals import dotted_name
from pyro_kd.utils.randomness import keeping_random_state
from pyro_kd.utils.user_code import called

__all__ = ["DistillationObjective"]


@dataclass(frozen=True, repr=False)
class DistillationObjective(Objective):
    """A distillation loss between a student and a teacher.

    Args:
        loss: :class:`~pyro_kd.SurrogateKD`, :class:`~pyro_kd.LocalKD`, or a different distillation loss.
        student: the program whose parameters are trained.
        teacher: usually a frozen program, ``pyro_kd.freeze(model)``.
        weight: factor of the loss: a number, or a function of the step.
        arguments: ``f(*args, **kwargs)`` of the step's arguments returns the programs' positional arguments, as a tuple. None
            passes the step's arguments on.
        latent_weight: a schedule for the loss's ``latent_weight`` (lambda): a function of the step. The loss that was passed stays
            as it is. None leaves the weight alone.
        teacher_forcing: a schedule for the loss's ``teacher_forcing`` (rho): likewise.
        student_fraction: a schedule for the ``student_fraction`` (mu) of :class:`~pyro_kd.OnPolicyKD`: likewise.
        local_steps: where the loss leaves teacher forcing open, the number of first steps in which every latent that can be compared
            is given; None for a quarter of the steps of the first fit.
        reuse: how many steps each draw of the teacher serves, in place of the loss's own ``reuse``: docs/teacher_cache.md.
        teacher_device: where the teacher runs, if it is not where the student is, as by :func:`~pyro_kd.teachers.on_device`:
            docs/several_processes.md.
        settles_at: the step from which the objective is the one that counts in the end; earlier validations do not count for the best
            parameters and for early stopping.

    Raises:
        InvalidProgramError: ``loss`` is no distillation loss, or a program is not callable.
        MissingDeviceError: there is no such device.

    Example:
        What an old model knows, as part of a continual loop::

            DistillationObjective(SurrogateKD(["x"]), vae.model, freeze(vae.model), arguments=lambda x: (len(x),))
    """

    loss: DistillationLoss
    student: Program
    teacher: Program
    teacher_forcing: Callable[[int], Any] | None = field(default=None, kw_only=True)
    student_fraction: Callable[[int], Any] | None = field(default=None, kw_only=True)
    local_steps: int | None = field(default=None, kw_only=True)
    reuse: int | None = field(default=None, kw_only=True)
    teacher_device: Any = field(default=None, kw_only=True)
    settles_at: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.loss, DistillationLoss):
            raise InvalidProgramError(
                f"the loss {self.loss!r:.60} is no distillation loss, such as SurrogateKD(targets=[...]) or LocalKD(targets=[...]). "
                "For an ELBO: ELBOObjective(elbo, model, guide)."
            )
        super().__post_init__()
        for option in self._schedules:
            if option not in self.loss.schedulable:
                fitting = {"teacher_forcing": "SurrogateKD", "student_fraction": "OnPolicyKD"}.get(option, "SurrogateKD")
                raise TypeError(
                    f"{type(self.loss).__name__} has no {option} to schedule: use {fitting}, or leave {option} out"
                )
        for option, schedule in self._schedules.items():
            if not callable(schedule):
                raise TypeError(
                    f"{option} must be a schedule, a function of the step, not {schedule!r:.60}: give the number to the loss, or "
                    f"{option}=lambda step: {schedule!r:.60}"
                )
        object.__setattr__(self, "loss", copy.copy(self.loss))  # its options may change, the user's loss must not
        if self.reuse is not None:
            self.loss.reuse = checked_reuse(self.loss, self.reuse)
        if self._schedules:
            self.loss.scheduled = frozenset(self._schedules)
        if self.teacher_device is not None:
            object.__setattr__(self, "teacher", _placed(self.teacher, self.teacher_device))

    def to(self, device: Any) -> None:
        """Move the programs to a device, but not a teacher that has its own."""
        super().to(device)
        place = place_of(self.teacher)
        if place is not None and self.teacher_device is not None:
            place.home = require_device(device)

    def _rows(self) -> dict[str, str]:
        further = {option: name_of(schedule) for option, schedule in self._schedules.items() if option != "latent_weight"}
        return super()._rows() | further

    def begin_fit(self, end: int) -> None:
        """Where the loss leaves teacher forcing open, train each site by itself in the first quarter of the first fit."""
        if self.loss.teacher_forcing is None and "teacher_forcing" not in self._schedules:
            if self.local_steps is None:
                object.__setattr__(self, "local_steps", end // 4)
            object.__setattr__(self, "settles_at", max(self.settles_at, self.local_steps or 0))
        warn_of_few_draws(self.loss, self.teacher, end, self.loss.pair_of(self.student, self.teacher).told)

    def begins_anew_at(self, step: int) -> bool:
        """Whether something else is minimised from this step on: likewise where local steps end, or what is given is switched."""
        ends_local_steps = self.loss.teacher_forcing is None and 0 < step == self.local_steps
        is_switched = switches(self.teacher_forcing, step) or switches(self.student_fraction, step)
        return super().begins_anew_at(step) or ends_local_steps or is_switched

    @property
    def _schedules(self) -> dict[str, Callable[[int], Any]]:
        """The schedules of the loss's options, by option."""
        schedules = {
            "latent_weight": self.latent_weight,
            "teacher_forcing": self.teacher_forcing,
            "student_fraction": self.student_fraction,
        }
        return {option: schedule for option, schedule in schedules.items() if schedule is not None}

    @property
    def _named_loss(self) -> tuple[str, Any]:
        return "loss", self.loss

    @property
    def programs(self) -> Mapping[str, Program]:
        """Both programs by their role."""
        return {"student": self.student, "teacher": self.teacher}

    @property
    def trained_programs(self) -> tuple[Program, ...]:
        """The student, and what the loss trains besides, such as a proposal."""
        return (self.student, *self.loss.trained_programs())

    def trained_runs(self, call: Call) -> list[tuple[Program, Any, Any]]:
        """One run of each of the trained programs; see :meth:`Objective.trained_runs`."""
        args, kwargs = call_of(*self.program_arguments(call))
        return [(self.student, args, kwargs), *self.loss.trained_runs(self.student, self.teacher, args, kwargs)]

    def value(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, trained: Collection[Tensor] = ()) -> Tensor:
        """The loss before its weight, a differentiable scalar tensor; see :meth:`Objective.value`."""
        args, kwargs = self._arguments_at(step, args, kwargs)
        return self.loss.differentiable_loss(self.student, self.teacher, *args, **kwargs)

    def value_with_terms(
        self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, trained: Collection[Tensor] = ()
    ) -> Evaluated:
        """The loss before its weight, with the weighted terms of its sites; see :meth:`Objective.value_with_terms`."""
        is_plain = self.loss.compile_options is None and self.loss.reuse == 1
        if is_plain or self._has_own_value or not self.loss.has_terms_of_reports:
            return self.evaluate(step, args, kwargs, trained=trained)
        args, kwargs = self._arguments_at(step, args, kwargs)
        return _evaluated(self.loss.trained_terms(self.student, self.teacher, *args, **kwargs))

    def evaluate(
        self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, trained: Collection[Tensor] = ()
    ) -> Evaluated:
        """The loss with the weighted terms of its sites; see :meth:`Objective.evaluate`."""
        if self._has_own_value:
            return Evaluated(self.value(step, args, kwargs, trained=trained), {})
        args, kwargs = self._arguments_at(step, args, kwargs)
        return _evaluated(self.loss.terms(self.student, self.teacher, *args, **kwargs))

    @property
    def _has_own_value(self) -> bool:
        """Whether the loss's class has its own ``differentiable_loss``, which terms know nothing of."""
        return type(self.loss).differentiable_loss is not DistillationLoss.differentiable_loss

    def compiled(self, **options: Any) -> "DistillationObjective":
        """A copy whose loss is compiled."""
        return replace(self, loss=copy.copy(self.loss).compile(**options))

    def describe(self, fingerprint: Fingerprint, name: str, call: Call) -> None:
        """Add loss, weights, arguments and teacher to the fingerprint of a run."""
        super().describe(fingerprint, name, call)
        for option in ("teacher_forcing", "student_fraction"):
            fingerprint.add(f"{name}: {option}", getattr(self, option))
        for option in (*self._schedules, "local_first"):  # the schedule decides what the loss's own attribute is
            fingerprint.found.pop(f"{name}: loss.{option}", None)
        if self.loss.reuse > 1:
            require_storable(*self.program_arguments(call))
        stored = _stored_parameters(self.teacher, *self.program_arguments(call))  # a module may load its tensors in this run
        place = place_of(self.teacher)  # the teacher is the same on any device
        fingerprint.add(f"{name}: teacher", self.teacher if place is None else place.teacher)
        for key, tensor in stored.items():
            fingerprint.add(f"{name}: teacher's pyro.param {dotted_name(key)!r}", tensor)

    def stored_constants(self, call: Call) -> dict[str, Tensor]:
        """The teacher's parameters in Pyro's store; see :meth:`Objective.stored_constants`."""
        return _stored_parameters(self.teacher, *self.program_arguments(call))

    @property
    def advice(self) -> Advice:
        """What errors may advise: the options of the loss."""
        return advice_of(self.loss)

    @property
    def pool(self) -> DrawPool | None:
        """The draws of the teacher that serve several steps; None where there are none."""
        pool: DrawPool | None = self.loss.pair_of(self.student, self.teacher).pool
        return pool

    def restore_pool(self, pool: DrawPool) -> None:
        """Take over the draws of a checkpoint."""
        self.loss.pair_of(self.student, self.teacher).pool = pool

    def _arguments_at(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The programs' arguments, after the schedules have set the loss's options."""
        for option, schedule in self._schedules.items():
            setattr(self.loss, option, called(schedule, f"the schedule of {option}", "f(step)", step))
        if self.loss.teacher_forcing is None:
            self.loss.local_first = float(step < (self.local_steps or 0))
        return self.program_arguments((args, kwargs))


def _evaluated(terms: SiteTerms) -> Evaluated:
    return Evaluated(terms.loss, {name: term.weight * term.value for name, term in terms.items() if term.weight != 0})


def _placed(teacher: Program, device: Any) -> Program:
    """A teacher on its device.

    Raises:
        MissingDeviceError: there is no such device.
        InvalidProgramError: the teacher is on a different one already, or not in memory.
    """
    there, place = require_device(device_of_process(device), "teacher_device"), place_of(teacher)
    if isinstance(teacher, StoredTeacher):
        raise InvalidProgramError(
            "teacher_device is for a teacher in memory, and that of a cache is not: its draws are moved to the student's device as "
            "they are read. Leave out teacher_device."
        )
    return teacher if place is not None and place.device == there else on_device(teacher, there)


def _stored_parameters(teacher: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The parameters of a teacher's ``pyro.param`` statements, from a run without effects; empty where it cannot run.

    A frozen program registers the parameters of its modules in its first run, and in no other. They are described as part of it, so
    the second run counts.
    """
    is_frozen = any(isinstance(owner, FrozenProgram) for owner in owners(teacher))
    found = dict[str, Tensor]()
    with keeping_random_state(), suppress(Exception):  # the first step will report what is wrong with the teacher
        for _ in range(1 + is_frozen):
            if is_frozen:
                pyro.set_rng_seed(0)  # what it draws may decide which parameters it meets
            with evaluation_mode(teacher), poutine.block():
                found = params_of(poutine.trace(teacher).get_trace(*args, **kwargs))
    return found
