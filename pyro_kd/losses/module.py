"""A loss bound to its two programs, for training loops in plain PyTorch."""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any, Protocol

from pyro import poutine
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn

from pyro_kd.errors import listing
from pyro_kd.freezing import FrozenProgram
from pyro_kd.losses.checks import params_of
from pyro_kd.losses.terms import SiteTerm

__all__ = ["DistillationModule", "owners"]


class _Loss(Protocol):
    def compile(self, **options: Any) -> Any: ...

    def differentiable_loss(self, student: Any, teacher: Any, *args: Any, **kwargs: Any) -> Tensor: ...

    def terms(self, student: Any, teacher: Any, *args: Any, **kwargs: Any) -> dict[str, SiteTerm]: ...


class DistillationModule(nn.Module):
    """What ``loss(student, teacher)`` returns: calling it gives the differentiable loss, a scalar tensor.

    ``parameters()``, ``state_dict()`` and ``train()`` reach the student alone, if it is an ``nn.Module`` or a method of one;
    ``to()`` moves the teacher along, if it is frozen or an ``nn.Module``, or a method, partial or Pyro handler of one. A
    student that is a plain function keeps its parameters in Pyro's parameter store or in its closure, and an optimiser takes
    them from there.

    Attributes:
        loss: the :class:`~pyro_kd.losses.base.DistillationLoss`.
        student: the student program.
    """

    def __init__(self, loss: _Loss, student: Callable[..., Any], teacher: Callable[..., Any]) -> None:
        super().__init__()
        self.loss = loss
        self.student = student
        owner = getattr(student, "__self__", None)
        if isinstance(owner, nn.Module):
            self.student_module = owner  # a method of a module: its parameters are the module's
        self._knows_parameters = False
        self._teacher = (teacher,)  # in a tuple, so that nn.Module does not register it

    @property
    def teacher(self) -> Callable[..., Any]:
        """The teacher program."""
        return self._teacher[0]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The differentiable loss for these arguments of both programs.

        Warns:
            UserWarning: at the first call, where the student is an ``nn.Module`` and has ``pyro.param`` statements besides, whose
                parameters ``parameters()`` does not reach.
        """
        if self._knows_parameters:
            return self.loss.differentiable_loss(self.student, self.teacher, *args, **kwargs)
        self._knows_parameters = True
        with poutine.trace(param_only=True) as captured:
            value = self.loss.differentiable_loss(self.student, self.teacher, *args, **kwargs)
        own = set(self.parameters())
        missed = [name for name, param in params_of(captured.trace).items() if param.requires_grad and param not in own]
        if own and missed:
            warnings.warn(
                f"parameters() of the student does not reach pyro.param {listing(missed)}: an optimiser over it would not train "
                "them. Make them attributes of the module (PyroParam or nn.Parameter), or give them to the optimiser as well: "
                "pyro.param(name).unconstrained().",
                stacklevel=2,
            )
        return value

    def compile(self, *args: Any, **options: Any) -> None:
        """Run the programs' handlers once for each kind of arguments, and after that a compiled graph of tensors.

        In place of ``nn.Module.compile``: ``torch.compile`` alone cannot follow Pyro's handlers.

        Args:
            **options: see :meth:`DistillationLoss.compile <pyro_kd.losses.base.DistillationLoss.compile>`.
        """
        if args:
            raise TypeError("compile() takes options by name, as torch.compile does: compile(mode='reduce-overhead')")
        self.loss = copy.copy(self.loss).compile(**options)

    def terms(self, *args: Any, **kwargs: Any) -> dict[str, SiteTerm]:
        """The loss taken apart by site, see :meth:`DistillationLoss.terms`."""
        return self.loss.terms(self.student, self.teacher, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DistillationModule":
        super()._apply(fn, recurse)
        for teacher in owners(self.teacher):
            if isinstance(teacher, nn.Module | FrozenProgram):
                teacher._apply(fn)
        return self


def owners(program: Any) -> list[Any]:
    """A program with what it wraps: under Pyro's handlers, a partial, or a bound method."""
    owners = []
    while program is not None:
        owners.append(program)
        inner: Any = unwrap(program)
        if inner is program:
            inner = getattr(program, "__self__", None) or (program.func if isinstance(program, functools.partial) else None)
        program = inner
    return owners
