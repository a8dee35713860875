"""What is minimised: a weighted sum of losses, each between two programs.

Pyro's ELBO is a loss between a model and a guide; a distillation loss is one between a student and a teacher, and subclasses
it. So one class holds both, and a sum of them is how continual learning joins new data with old knowledge.
"""

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyro_kd.errors import NonFiniteLossError, NoParametersError
from pyro_kd.losses import DistillationLoss
from pyro_kd.losses.validation import ValidationSchedule
from pyro_kd.training.annealing import ScaleLatentsMessenger
from pyro_kd.training.compiled import CompiledELBO
from pyro_kd.utils.display import as_html, name_of

__all__ = ["Objective", "Schedule", "learns_nothing"]

Schedule = float | Callable[[int], float]
"""A number, or a function of the step (0 for the first), such as :func:`pyro_kd.training.linear`."""


@dataclass(frozen=True, repr=False)
class Objective:
    """One loss, and the programs that it is between.

    Args:
        loss: a :class:`~pyro_kd.losses.base.DistillationLoss`, any of Pyro's ELBOs, or another object with a method
            ``differentiable_loss(model, guide, *args, **kwargs)`` that returns a scalar tensor, or ``loss`` and
            ``loss_and_grads`` as Pyro's ELBOs have them.
        model: the student, or the ELBO's model.
        guide: the teacher, or the ELBO's guide.
        weight: factor of the loss: a number, or a function of the step.
        arguments: ``f(*args, **kwargs)`` of the step's arguments gives the programs' positional arguments, as a tuple; None
            passes the step's arguments on.
        latent_weight: for a distillation loss, its weight of latent terms as a function of the step (a schedule for lambda);
            for an ELBO, the weight of its latents' log densities, that is of its KL (annealing). None leaves it alone.

    A differentiable ELBO is run with Pyro's validation in its first call for each kind of arguments and in every 50th after it, as
    distillation losses are; in a fit also where its terms are logged, and before each checkpoint.

    Example:
        An ELBO whose KL is turned on during the first 1000 steps::

            Objective(Trace_ELBO(), vae.model, vae.guide, latent_weight=linear(0.0, 1.0, 1000))
    """

    loss: Any
    model: Callable[..., Any]
    guide: Callable[..., Any]
    weight: Schedule = 1.0
    arguments: Callable[..., tuple[Any, ...]] | None = None
    latent_weight: Callable[[int], Any] | None = None
    _elbo: CompiledELBO | None = field(default=None, init=False, repr=False)
    _validation: ValidationSchedule = field(default_factory=ValidationSchedule, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.latent_weight is not None and not getattr(self.loss, "anneals", True):
            raise TypeError(
                f"{type(self.loss).__name__} cannot be annealed: leave latent_weight away, it has a weight of its own"
            )
        if self.latent_weight is not None and isinstance(self.loss, DistillationLoss):
            object.__setattr__(
                self, "loss", copy.copy(self.loss)
            )  # whose weight changes: the user's own loss stays as it is

    def __repr__(self) -> str:
        return f"Objective({', '.join(f'{name}={value}' for name, value in self._rows().items())})"

    def _repr_html_(self) -> str:
        return as_html("Objective", self._rows())

    def _rows(self) -> dict[str, str]:
        has_own = type(self.loss).__repr__ is not object.__repr__
        rows = {"loss": repr(self.loss) if has_own else f"{type(self.loss).__name__}()"}
        rows |= {"model": name_of(self.model), "guide": name_of(self.guide), "weight": _schedule(self.weight)}
        return rows if self.latent_weight is None else rows | {"latent_weight": _schedule(self.latent_weight)}

    @property
    def programs(self) -> tuple[Callable[..., Any], ...]:
        """The programs whose parameters are trained."""
        return (self.model,) if isinstance(self.loss, DistillationLoss) else (self.model, self.guide)

    def value(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, validated: bool = False) -> Tensor:
        """The differentiable loss, before its weight.

        Args:
            step: whose schedule to take.
            args, kwargs: of the step.
            validated: whether an ELBO runs in its programs, not compiled, with validation as the user has it.

        Raises:
            NonFiniteLossError: it is NaN or infinite.
        """
        if self._elbo is not None and not validated:
            args, kwargs = self.call((args, kwargs))
            value = self._elbo.value(None if self.latent_weight is None else float(self.latent_weight(step)), args, kwargs)
            if not torch.isfinite(value):
                raise NonFiniteLossError(_culprit(value, self.model, self.guide, args, kwargs))
            return value
        model, guide, args, kwargs = self._call(step, args, kwargs)
        is_own = isinstance(self.loss, DistillationLoss)  # which counts its calls itself
        with nullcontext() if is_own or validated else self._validation.of_call(args, kwargs):
            if self.is_differentiable:
                value = self.loss.differentiable_loss(model, guide, *args, **kwargs)
            else:
                value = torch.tensor(float(self.loss.loss(model, guide, *args, **kwargs)))
        if not isinstance(self.loss, DistillationLoss) and not torch.isfinite(value):
            raise NonFiniteLossError(_culprit(value, model, guide, args, kwargs))
        return value

    def compiled(self, **options: Any) -> "Objective":
        """The same, compiled where the loss is differentiable: see :meth:`pyro_kd.losses.base.DistillationLoss.compile`."""
        if isinstance(self.loss, DistillationLoss):
            return replace(self, loss=copy.copy(self.loss).compile(**options))
        objective = replace(self)
        if self.is_differentiable:
            object.__setattr__(objective, "_elbo", CompiledELBO(self.loss, self.model, self.guide, **options))
        return objective

    @property
    def is_differentiable(self) -> bool:
        """Whether the loss is to be had as a tensor; some of Pyro's ELBOs give a number and put gradients into place themselves."""
        return callable(getattr(self.loss, "differentiable_loss", None))

    def add_gradients(
        self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], factor: float, params: Iterable[Tensor]
    ) -> float:
        """Add ``factor`` times the gradient of a loss that is not differentiable as a tensor; returns the loss.

        Raises:
            NonFiniteLossError: it is NaN or infinite.
            NoParametersError: it has put no gradient into place.
        """
        model, guide, args, kwargs = self._call(step, args, kwargs)
        before = {param: param.grad for param in params}
        for param in before:
            param.grad = None
        value = float(self.loss.loss_and_grads(model, guide, *args, **kwargs))
        if all(param.grad is None for param in before):
            raise learns_nothing(type(self.loss).__name__)
        for param, grad in before.items():
            if param.grad is not None:
                param.grad = factor * param.grad + (0 if grad is None else grad)
            else:
                param.grad = grad
        if not math.isfinite(value):
            raise NonFiniteLossError(_culprit(torch.tensor(value), model, guide, args, kwargs))
        return value

    def terms(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor] | None:
        """The loss taken apart by site, each term with its weight in the loss; None for an ELBO."""
        if not isinstance(self.loss, DistillationLoss):
            return None
        model, guide, args, kwargs = self._call(step, args, kwargs)
        terms = self.loss.terms(model, guide, *args, **kwargs)
        return {name: term.weight * term.value for name, term in terms.items() if term.weight != 0}

    def check(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Evaluate the loss in its programs, not compiled, with validation as the user has it.

        Raises:
            NonFiniteLossError: it is NaN or infinite.
            ValueError: a distribution's parameter is outside of its constraint.
        """
        if self.terms(step, args, kwargs) is None:
            self.value(step, args, kwargs, validated=True)

    def weight_at(self, step: int) -> float:
        """The factor of the loss at a step."""
        return float(self.weight(step) if callable(self.weight) else self.weight)

    def call(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The programs' arguments, made of those of a step.

        Raises:
            TypeError: ``arguments`` returns no tuple.
        """
        if self.arguments is None:
            return call
        made = self.arguments(*call[0], **call[1])
        if not isinstance(made, tuple) or isinstance(made, PackedSequence):
            raise TypeError(
                f"Objective(arguments=f): f returned {type(made).__name__}, and must return a tuple: lambda x: (len(x), x)"
            )
        return made, {}

    def _call(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = self.call((args, kwargs))
        model, guide = self.model, self.guide
        if self.latent_weight is not None:
            weight = self.latent_weight(step)
            if isinstance(self.loss, DistillationLoss):
                self.loss.latent_weight = weight
            else:
                model, guide = ScaleLatentsMessenger(weight)(model), ScaleLatentsMessenger(weight)(guide)
        return model, guide, args, kwargs


def _schedule(weight: Schedule) -> str:
    return name_of(weight) if callable(weight) else f"{weight:g}"


def learns_nothing(what: str) -> NoParametersError:
    """The error for a loss that depends on nothing that is trained."""
    return NoParametersError(
        f"{what} depends on no parameter that is trained: its program has none, they do not require gradients, what it computes "
        "is detached or made of a copy of its module, or the terms that they enter have weight 0. Give it pyro.param or nn.Module "
        "parameters (and latent_weight > 0 where only discrete latents depend on them); to look at the loss without training: "
        "evaluate(...)."
    )


def _culprit(value: Tensor, model: Any, guide: Any, args: Any, kwargs: Any) -> str:
    """Which site made an ELBO NaN or infinite, from one more run of its programs."""
    message = f"the ELBO is {value.item()}"
    with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        for role, trace in (("guide", guide_trace), ("model", model_trace)):
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and site["value"] is not None:
                    log_prob = torch.as_tensor(site["fn"].log_prob(site["value"]))
                    if not log_prob.isfinite().all():
                        return f"{message}: site {name!r} of the {role} has a log density that is NaN or infinite"
    return f"{message}, though no site is on a second run"
