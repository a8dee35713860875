"""A student and a teacher, with what earlier runs have shown about them, so that each check runs once per pair of programs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_kd.isolation.programs import require_callable
from pyro_kd.isolation.reaching import Reached
from pyro_kd.losses.between_sites import BetweenSites
from pyro_kd.losses.forcing import Latents
from pyro_kd.losses.validation import ValidationSchedule
from pyro_kd.sites.tracing import params_of
from pyro_kd.utils.pyro_internals import unconstrained_params
from pyro_kd.utils.torch_internals import version_of
from pyro_kd.utils.warning import warn_once

__all__ = ["Program", "ProgramPair", "ProgramPairs"]

Program = Callable[..., Any]

_MOST_PAIRS = 4


@dataclass(eq=False)
class ProgramPair:
    """Two programs, and what is known about them.

    Attributes:
        student, teacher: the programs.
        told: the warnings that the user has been given.
        between: what is known about draws between sample sites.
        validation: decides which calls are validated.
        comparable: signatures of the pairs of distributions that were found comparable.
        teacher_leaves: the leaf tensors that the teacher's densities depend on, by the names of its sample sites; one entry.
        latents: what a first run has shown about the latents; None before it. Asked for where a loss decides itself what it gives.
        latents_with: the options of the loss for which that holds.
        captured: the loss as a graph, where it is compiled.
        captured_draws: the teacher's draws as a graph, likewise.
        nestings: the number of dimensions that plates take, by what an enumerated run depends on.
        has_agreeing_modes: whether train and eval modes have been checked.
        has_checked_factors: whether ``pyro.factor`` statements have been looked for.
        has_checked_points: whether point masses that no term covers have been looked for, in a run with gradients.
        is_learning: whether the loss was found to depend on the student's parameters.
        is_seen_by_svi: whether SVI was found to train these parameters.
        pool: draws of the teacher that serve several steps; None before the first of them.
        keeps_target_noise: whether the noise of targets is recorded, too, since gradients run the teacher again.
        teacher_params: names of the parameters in Pyro's store that the teacher was seen to use; not those of a frozen program.
        sample_plans: how a loss gets several samples of the noise for each row, by the kinds of the programs' arguments.
    """

    student: Program
    teacher: Program
    told: set[str] = field(default_factory=set)
    between: BetweenSites = field(init=False)
    validation: ValidationSchedule = field(default_factory=ValidationSchedule)
    comparable: set[tuple[Any, ...]] = field(default_factory=set)
    teacher_leaves: dict[tuple[str, ...], set[Tensor]] = field(default_factory=dict)
    latents: Latents | None = None
    latents_with: tuple[Any, ...] = ()
    captured: Any = None
    captured_draws: Any = None
    nestings: dict[Any, int] = field(default_factory=dict)
    has_agreeing_modes: bool = False
    has_checked_factors: bool = False
    has_checked_points: bool = False
    is_learning: bool = False
    is_seen_by_svi: bool = False
    keeps_target_noise: bool = False
    teacher_params: set[str] = field(default_factory=set)
    sample_plans: dict[Any, Any] = field(default_factory=dict)
    pool: Any = None
    _differentiates: bool | None = None
    _teacher_modules: list[nn.Module] | None = None

    def __post_init__(self) -> None:
        require_callable(self.student, "the student (first argument)")
        require_callable(self.teacher, "the teacher (second argument)")
        self.between = BetweenSites(self.student, self.teacher, self.told)

    @property
    def has_kept(self) -> bool:
        """Whether there are draws or graphs, which later steps use."""
        return not (self.pool is None and self.captured is None and self.captured_draws is None)

    @property
    def teacher_versions(self) -> tuple[tuple[int, int], ...]:
        """The parameters of the teacher, by identity and number of writes in place.

        They are those of modules that it reaches and the student does not, and of Pyro's store. Where they change, the draws of the
        teacher are old.
        """
        if self._teacher_modules is None:
            mine = Reached(self.student).modules
            self._teacher_modules = [module for module in Reached(self.teacher).modules if module not in mine]
        params: list[Tensor] = [
            param for module in self._teacher_modules for param in module._parameters.values() if param is not None
        ]
        if self.teacher_params:
            stored = unconstrained_params(pyro.get_param_store())
            params += [stored[name] for name in sorted(self.teacher_params) if name in stored]
        return tuple((id(param), version_of(param)) for param in params)

    def note_params(self, teacher: Trace) -> None:
        """Note the parameters in Pyro's store that a run of the teacher has used."""
        stored = unconstrained_params(pyro.get_param_store())
        self.teacher_params |= {name for name, leaf in params_of(teacher).items() if stored.get(name) is leaf}

    def autograd_in_student(self) -> AbstractContextManager[Any]:
        """Turn gradients on for a student that computes gradients itself, as energy and score models do."""
        if torch.is_grad_enabled():
            return nullcontext()
        if self._differentiates is None:
            self._differentiates = Reached(self.student).differentiates
        return torch.enable_grad() if self._differentiates else nullcontext()


class ProgramPairs:
    """The last few pairs of programs that a loss was called with.

    Attributes:
        told: what the user has been warned of.
    """

    def __init__(self, told: set[str] | None = None) -> None:
        self._pairs: list[ProgramPair] = []
        self.told: set[str] = set() if told is None else told  # per loss: a program may be made anew for each call

    def of(self, student: Program, teacher: Program) -> ProgramPair:
        """The pair of these programs. They are compared by identity: equal programs may have different networks.

        Raises:
            InvalidProgramError: one of the two is not a program.

        Warns:
            UserWarning: draws or graphs of an earlier pair are lost.
        """
        for pair in self._pairs:
            if _is_same(pair.student, student) and _is_same(pair.teacher, teacher):
                return pair
        if len(self._pairs) == _MOST_PAIRS and self._pairs[0].has_kept:
            warn_once(
                f"a loss keeps the teacher's draws and the graphs of {_MOST_PAIRS} pairs of programs, and this is one more: those of "
                "the oldest pair are lost. If a program is made anew for each call, make it once. For more pairs, make a loss for "
                "each.",
                self.told,
            )
        pair = ProgramPair(student, teacher, self.told)
        self._pairs = [*self._pairs[1 - _MOST_PAIRS :], pair]
        return pair


def _is_same(first: Program, second: Program) -> bool:
    """Whether two programs are one object, or one method of one object, which Python makes anew whenever it is looked up."""
    if first is second:
        return True
    if isinstance(first, MethodType) and isinstance(second, MethodType):
        return first.__self__ is second.__self__ and first.__func__ is second.__func__
    return False
