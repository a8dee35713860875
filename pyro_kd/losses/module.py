"""A loss bound to its two programs, for training loops in plain PyTorch."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import pyro
from pyro import poutine
from torch import Tensor, nn

from pyro_kd.errors import listing
from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.programs import owners
from pyro_kd.losses.reached import ReachedParameters
from pyro_kd.losses.terms import SiteTerm
from pyro_kd.sites.tracing import params_of
from pyro_kd.teachers.on_device import place_of
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.display import as_html, as_text, name_of
from pyro_kd.utils.pyro_internals import unconstrained_params

__all__ = ["DistillationModule"]


class _Loss(Protocol):
    def compile(self, **options: Any) -> Any: ...

    def differentiable_loss(self, student: Any, teacher: Any, *args: Any, **kwargs: Any) -> Tensor: ...

    def terms(self, student: Any, teacher: Any, *args: Any, **kwargs: Any) -> dict[str, SiteTerm]: ...


class DistillationModule(nn.Module):
    """What ``loss(student, teacher)`` returns. Calling it returns the differentiable loss, a scalar tensor.

    ``parameters()``, ``state_dict()``, ``train()`` and ``to()`` reach the student: the student itself, if it is an ``nn.Module``;
    the module, if it is a module's method; and the modules and tensors that it finds in closures, defaults, globals, partials and
    objects, as :func:`~pyro_kd.freeze` does. Parameters of ``pyro.param`` statements are known once the student has run: call the
    module once before you create an optimiser. ``to()`` also moves the teacher, if it is frozen or an ``nn.Module``, or a method,
    partial or Pyro handler of one; a teacher of :func:`~pyro_kd.teachers.on_device` stays.

    Attributes:
        loss: the :class:`~pyro_kd.losses.base.DistillationLoss`.
        student: the student program.
        reached: modules and parameters that the student uses but does not hold itself.
    """

    is_program = False  # it is a loss between two programs

    def __init__(self, loss: _Loss, student: Callable[..., Any], teacher: Callable[..., Any]) -> None:
        super().__init__()
        self.loss = loss
        self.student = student
        owner = getattr(student, "__self__", None)
        if isinstance(owner, nn.Module):
            self.student_module = owner  # the student is a method: its parameters are those of the module
        self._is_module = isinstance(student, nn.Module) or isinstance(owner, nn.Module)
        self.reached = ReachedParameters()
        self.reached.find(student, self.modules())
        self._store_size = -1  # when the student's parameters were last looked for
        self._handed_out = False
        self._teacher = (teacher,)  # in a tuple, so that nn.Module does not register it

    @property
    def teacher(self) -> Callable[..., Any]:
        """The teacher program."""
        return self._teacher[0]

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The student's parameters by name, as for any ``nn.Module``."""
        self._handed_out = True
        return super().named_parameters(*args, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The differentiable loss for these arguments of both programs.

        Warns:
            UserWarning: a call finds parameters of ``pyro.param`` statements that an optimiser may lack: ``parameters()`` was called
                before, or the student is a module, whose own ``parameters()`` does not reach them.
        """
        store = pyro.get_param_store()
        if self._store_size == len(store):
            value = self.loss.differentiable_loss(self.student, self.teacher, *args, **kwargs)
            if self._store_size != len(store):
                reached = leaves_of([value])
                self._look_again({name: param for name, param in unconstrained_params(store).items() if param in reached})
            return value
        with poutine.trace(param_only=True) as captured:
            value = self.loss.differentiable_loss(self.student, self.teacher, *args, **kwargs)
        self._look_again({name: param for name, param in params_of(captured.trace).items() if param.requires_grad})
        return value

    def _look_again(self, params: Mapping[str, Tensor]) -> None:
        """Find the parameters that exist after a call."""
        self._store_size = len(pyro.get_param_store())
        others = [module for module in self.modules() if module is not self.reached]
        self.reached.find(self.student, others)
        own = {param for _, param in super().named_parameters()}
        missed = {name: param for name, param in params.items() if param not in own}
        self.reached.add(missed)
        if missed and own and (self._handed_out or self._is_module):
            warnings.warn(
                f"parameters() does not reach pyro.param {listing(missed)} before the student has run, so an optimiser that was "
                "created earlier, or from the student's own parameters(), does not train them. Call this module once, then create "
                "the optimiser from its parameters(); or make them attributes of the student's module (PyroParam or nn.Parameter).",
                stacklevel=4,
            )

    def __repr__(self) -> str:
        return as_text(type(self).__name__, self._rows())

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, self._rows())

    def _rows(self) -> dict[str, str]:
        count = sum(param.numel() for _, param in super().named_parameters())
        known = "" if self._store_size >= 0 else "; pyro.param statements are known after a call"
        return {
            "loss": repr(self.loss),
            "student": f"{name_of(self.student)}: {count:,} parameters{known}",
            "teacher": name_of(self.teacher),
        }

    def compile(self, *args: Any, **options: Any) -> None:
        """Run the programs' handlers once per signature of the arguments, and a compiled graph after that.

        Replaces ``nn.Module.compile``, since ``torch.compile`` alone cannot follow Pyro's handlers. What is compiled is a copy of the
        loss: from then on, change its options in ``module.loss``. The loss that made the module stays as it is.

        Args:
            **options: see :meth:`DistillationLoss.compile <pyro_kd.losses.base.DistillationLoss.compile>`.
        """
        if args:
            raise TypeError("compile() takes options by name, as torch.compile does: compile(mode='reduce-overhead')")
        self.loss = copy.copy(self.loss).compile(**options)

    def terms(self, *args: Any, **kwargs: Any) -> dict[str, SiteTerm]:
        """The terms of the loss by site, see :meth:`DistillationLoss.terms`."""
        return self.loss.terms(self.student, self.teacher, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DistillationModule":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for teacher in owners(self.teacher) if place_of(self.teacher) is None else ():
            if isinstance(teacher, nn.Module | FrozenProgram):
                teacher._apply(fn)
        return self
