"""What a trainer minimises: a weighted sum of objectives, each a loss bound to the two programs that it compares.

There are two kinds. A :class:`~pyro_kd.training.DistillationObjective` binds a distillation loss to a student and a teacher, an
:class:`~pyro_kd.training.ELBOObjective` binds an ELBO to a model and a guide. Continual learning adds one of each. This module holds
what they share: weights and schedules, and the interface that the training loop uses. The loop asks an objective and never looks at
its loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from pyro_kd.errors import NoParametersError
from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.programs import owners, require_callable
from pyro_kd.losses.reuse import DrawPool
from pyro_kd.teachers.on_device import place_of
from pyro_kd.training.batches import Call, require_tuple
from pyro_kd.training.fingerprint import Fingerprint
from pyro_kd.training.schedules import switches
from pyro_kd.utils.advice import Advice, advice
from pyro_kd.utils.display import as_html, name_of
from pyro_kd.utils.pyro_internals import guess_plate_nesting
from pyro_kd.utils.user_code import called

__all__ = ["Evaluated", "Objective", "Program", "Schedule", "learns_nothing"]

Program = Callable[..., Any]

Schedule = float | Callable[[int], float]
"""A number, or a function of the step (0 for the first), such as :func:`pyro_kd.training.linear`."""


class Evaluated(NamedTuple):
    """The value of an objective on one batch.

    Attributes:
        value: the loss before the objective's weight, a differentiable scalar tensor.
        terms: the weighted term of each site, scalar tensors; empty where the loss has no terms. They add up to ``value``, unless the
            loss overrides ``combine``.
    """

    value: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True, repr=False, kw_only=True)
class Objective(ABC):
    """Base class of a loss that is bound to its programs. Use one of its subclasses.

    Args:
        weight: factor of the loss: a number, or a function of the step.
        arguments: ``f(*args, **kwargs)`` of the step's arguments returns the programs' positional arguments, as a tuple. None
            passes the step's arguments on.
        latent_weight: a schedule for the weight of the latents, a function of the step. None leaves the weight alone.
    """

    weight: Schedule = 1.0
    arguments: Callable[..., tuple[Any, ...]] | None = None
    latent_weight: Callable[[int], Any] | None = None

    settles_at = 0
    """The step from which the objective is the one that counts in the end."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Objective":
        """Refuse to make an objective of the base class, with an error that names the right one."""
        if cls is Objective:
            raise TypeError(
                "Objective is a base class: use DistillationObjective(loss, student, teacher), or ELBOObjective(elbo, model, guide)"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for role, program in self.programs.items():
            require_callable(program, f"the {role}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self._rows().items())})"

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, self._rows())

    def _rows(self) -> dict[str, str]:
        name, loss = self._named_loss
        representation: Any = type(loss).__repr__
        rows = {name: f"{type(loss).__name__}()" if representation is object.__repr__ else repr(loss)}
        rows |= {role: name_of(program) for role, program in self.programs.items()} | {"weight": _shown(self.weight)}
        return rows if self.latent_weight is None else rows | {"latent_weight": _shown(self.latent_weight)}

    @property
    @abstractmethod
    def _named_loss(self) -> tuple[str, Any]:
        """The loss, and the name of its argument."""

    @property
    @abstractmethod
    def programs(self) -> Mapping[str, Program]:
        """Both programs by their role."""

    @property
    @abstractmethod
    def trained_programs(self) -> tuple[Program, ...]:
        """The programs whose parameters are trained."""

    def trained_runs(self, call: Call) -> list[tuple[Program, Any, Any]]:
        """One run of each of the trained programs: a program, its positional arguments, and those by name.

        Args:
            call: arguments of a step.
        """
        args, kwargs = self.program_arguments(call)
        return [(program, args, kwargs) for program in self.trained_programs]

    @abstractmethod
    def value(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, trained: Collection[Tensor] = ()) -> Tensor:
        """The loss before its weight, a differentiable scalar tensor, in the fastest way that there is.

        Args:
            step: the step whose schedules apply.
            args, kwargs: arguments of the step.
            trained: the tensors that are trained. Without them the value need not be differentiable.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
            NoParametersError: the loss depends on none of ``trained``, and the objective can tell.
        """

    def value_with_terms(
        self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, trained: Collection[Tensor] = ()
    ) -> Evaluated:
        """The same as :meth:`value`, with the terms of each site where the loss has terms."""
        return self.evaluate(step, args, kwargs, trained=trained)

    @abstractmethod
    def evaluate(
        self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, trained: Collection[Tensor] = ()
    ) -> Evaluated:
        """The same, where the programs themselves run, and not a compiled graph, under the user's validation.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
            NoParametersError: as for :meth:`value`.
            ValueError: a distribution's parameter violates its constraint.
        """

    def begin_fit(self, end: int) -> None:  # noqa: B027  (most objectives do not care)
        """Called when the training loop knows at which step it will end."""

    @abstractmethod
    def compiled(self, **options: Any) -> "Objective":
        """A copy whose :meth:`value` is compiled, where that is possible; :meth:`evaluate` is not.

        Args:
            **options: see :meth:`DistillationLoss.compile <pyro_kd.losses.base.DistillationLoss.compile>`.
        """

    def describe(self, fingerprint: Fingerprint, name: str, call: Call) -> None:
        """Add to the fingerprint of a run what makes this objective the one that it is.

        Args:
            fingerprint: what is added to.
            name: name of the objective, with which each entry starts.
            call: arguments of a step.
        """
        fingerprint.add(f"{name}: loss", self._named_loss[1])
        fingerprint.add(f"{name}: weight", self.weight)
        fingerprint.add(f"{name}: latent_weight", self.latent_weight)
        fingerprint.add(f"{name}: arguments", self.arguments)

    def stored_constants(self, call: Call) -> dict[str, Tensor]:
        """The parameters of ``pyro.param`` statements in programs that are not trained, by name.

        Args:
            call: arguments of a step.
        """
        return {}

    def guess_plate_nesting(self, call: Call) -> None:
        """Let Pyro find the depth of the plates now, if it would otherwise run the programs for it in the first step."""
        args, kwargs = self.program_arguments(call)
        model, guide = self.programs.values()
        guess_plate_nesting(self._named_loss[1], model, guide, args, kwargs)

    @property
    def advice(self) -> Advice:
        """What errors may advise: the options of the loss."""
        return Advice(type(self._named_loss[1]).__name__, frozenset())

    @property
    def pool(self) -> DrawPool | None:
        """The draws of a teacher that serve several steps; None where there are none."""
        return None

    def restore_pool(self, pool: DrawPool) -> None:  # noqa: B027  (most objectives have none)
        """Go on with the draws of a checkpoint."""

    def to(self, device: Any) -> None:
        """Move the modules of the programs, and what loss and arguments hold, to a device."""
        for program in (*self.programs.values(), *self.trained_programs):
            for owner in owners(program) if place_of(program) is None else ():
                if isinstance(owner, nn.Module | FrozenProgram):
                    owner.to(device)
        for holder in (self._named_loss[1], self.arguments):
            move = getattr(holder, "to", None)  # of losses and replays that hold old models
            if callable(move):
                move(device)

    def weight_at(self, step: int) -> float:
        """The factor of the loss at a step."""
        return float(
            called(self.weight, "the objective's weight", "f(step)", step) if callable(self.weight) else self.weight
        )

    def begins_anew_at(self, step: int) -> bool:
        """Whether something else is minimised from this step on: a turn of :func:`~pyro_kd.training.in_turn`, or a switch.

        The gradients may then differ by orders of magnitude, and the optimiser forgets what it knows of the earlier ones.
        """
        return switches(self.weight, step)

    def program_arguments(self, call: Call) -> Call:
        """The programs' arguments, made from those of a step.

        Raises:
            TypeError: ``arguments`` returns something that is not a tuple.
        """
        if self.arguments is None:
            return call
        form = "f(*args, **kwargs) with the arguments of a step"
        made = called(self.arguments, f"{type(self).__name__}(arguments=...)", form, *call[0], **call[1])
        return require_tuple(made, f"{type(self).__name__}(arguments=f)", "lambda x: (len(x), x)"), {}


def learns_nothing(what: str) -> NoParametersError:
    """The error for a loss that depends on nothing that is trained."""
    takes_weight = advice().takes("latent_weight")
    weight = " (and latent_weight > 0 where only discrete latents depend on them)" if takes_weight else ""
    return NoParametersError(
        f"{what} depends on no parameter that is trained: its program has none, they do not require gradients, what it computes "
        "is detached or made from a copy of its module, or the terms that they enter have weight 0. Give it pyro.param or nn.Module "
        f"parameters{weight}. To look at the loss without training: evaluate(...)."
    )


def _shown(weight: Any) -> str:
    return name_of(weight) if callable(weight) else f"{weight:g}"
