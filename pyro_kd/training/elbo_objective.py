"""The objective of an ELBO: between a model and a guide, which are both trained."""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from pyro_kd.errors import InvalidProgramError, NonFiniteLossError
from pyro_kd.losses import DistillationLoss
from pyro_kd.losses.validation import ValidationSchedule
from pyro_kd.sites.full_precision import in_full_precision
from pyro_kd.training.annealing import ScaleLatentsMessenger
from pyro_kd.training.compiled import CompiledELBO
from pyro_kd.training.known_gradients import loss_with_gradients
from pyro_kd.training.objectives import Evaluated, Objective, Program
from pyro_kd.utils.autocast import full_precision

__all__ = ["ELBOObjective"]


@dataclass(frozen=True, repr=False)
class ELBOObjective(Objective):
    """An ELBO between a model and a guide.

    Args:
        elbo: one of Pyro's ELBOs; or an object with a method ``differentiable_loss(model, guide, *args, **kwargs)`` that returns a
            scalar tensor, or with ``loss`` and ``loss_and_grads`` as Pyro's ELBOs have them.
        model: the generative program, which is trained.
        guide: the inference program, which is trained too.
        weight: factor of the loss: a number, or a function of the step.
        arguments: ``f(*args, **kwargs)`` of the step's arguments returns the programs' positional arguments, as a tuple. None
            passes the step's arguments on.
        latent_weight: a schedule for the weight of the latents' log densities, that is of the KL (annealing): a function of the step.
            None leaves them alone.

    Pyro validates an ELBO's programs in its first call for each signature of arguments and in every 50th after it, as it does for
    distillation losses; in a fit also in the steps whose terms are logged, and before each checkpoint.

    Raises:
        InvalidProgramError: ``elbo`` is a distillation loss or no loss at all, or a program is not callable.
        TypeError: ``elbo`` cannot be annealed, and there is a ``latent_weight``.

    Example:
        An ELBO whose KL is turned on during the first 1000 steps::

            ELBOObjective(Trace_ELBO(), vae.model, vae.guide, latent_weight=linear(0.0, 1.0, 1000))
    """

    elbo: Any
    model: Program
    guide: Program
    _compiled: CompiledELBO | None = field(default=None, init=False, repr=False, compare=False)
    _validation: ValidationSchedule = field(default_factory=ValidationSchedule, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.elbo, DistillationLoss):
            raise InvalidProgramError(
                f"{type(self.elbo).__name__} is a distillation loss: use DistillationObjective(loss, student, teacher)"
            )
        if not self._is_differentiable and not callable(getattr(self.elbo, "loss_and_grads", None)):
            raise InvalidProgramError(
                f"the ELBO {self.elbo!r:.60} has no differentiable_loss(model, guide, ...): pass an ELBO of Pyro's such as "
                "Trace_ELBO(), or an object with this method. For SurrogateKD(...) or LocalKD(...): "
                "DistillationObjective(loss, student, teacher)."
            )
        super().__post_init__()
        if self.latent_weight is not None and not getattr(self.elbo, "anneals", True):
            raise TypeError(f"{type(self.elbo).__name__} cannot be annealed: omit latent_weight, it has a weight of its own")

    @property
    def _named_loss(self) -> tuple[str, Any]:
        return "elbo", self.elbo

    @property
    def programs(self) -> Mapping[str, Program]:
        """Both programs by their role."""
        return {"model": self.model, "guide": self.guide}

    @property
    def trained_programs(self) -> tuple[Program, ...]:
        """Model and guide."""
        return self.model, self.guide

    def value(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, trained: Collection[Tensor] = ()) -> Tensor:
        """The ELBO before its weight, a differentiable scalar tensor; see :meth:`Objective.value`."""
        args, kwargs = self.program_arguments((args, kwargs))
        if self._compiled is not None:
            weight = None if self.latent_weight is None else float(self.latent_weight(step))
            return self._compiled.value(
                weight, args, kwargs, lambda loss: self._check_finite(loss, self.model, self.guide, args, kwargs)
            )
        if not self._is_differentiable and trained:
            return self._eager_value(step, args, kwargs, trained)
        with self._validation.of_call(args, kwargs):
            return self._eager_value(step, args, kwargs, trained)

    def value_with_terms(
        self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, trained: Collection[Tensor] = ()
    ) -> Evaluated:
        """The ELBO, which has no terms, by a graph if there is one; see :meth:`Objective.value_with_terms`."""
        if self._compiled is None:
            return self.evaluate(step, args, kwargs, trained=trained)
        return Evaluated(self.value(step, args, kwargs, trained=trained), {})

    def evaluate(
        self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, trained: Collection[Tensor] = ()
    ) -> Evaluated:
        """The ELBO, which has no terms; see :meth:`Objective.evaluate`."""
        return Evaluated(self._eager_value(step, *self.program_arguments((args, kwargs)), trained), {})

    def compiled(self, **options: Any) -> "ELBOObjective":
        """A copy whose ELBO is compiled, where it is differentiable as a tensor."""
        objective = replace(self)
        if self._is_differentiable:
            object.__setattr__(objective, "_compiled", CompiledELBO(self.elbo, self.model, self.guide, **options))
        return objective

    @property
    def _is_differentiable(self) -> bool:
        """Whether the ELBO is available as a tensor; the others return a number and put gradients into place themselves."""
        return callable(getattr(self.elbo, "differentiable_loss", None))

    @full_precision()
    def _eager_value(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], trained: Collection[Tensor]) -> Tensor:
        """The ELBO from a run of its programs."""
        model, guide = in_full_precision(self.model), in_full_precision(self.guide)
        if self.latent_weight is not None:
            weight = self.latent_weight(step)
            model, guide = ScaleLatentsMessenger(weight)(model), ScaleLatentsMessenger(weight)(guide)
        value: Tensor
        if self._is_differentiable:
            needs_gradient = isinstance(self.elbo, TraceEnum_ELBO) and not torch.is_grad_enabled()  # it raises without
            with torch.enable_grad() if needs_gradient else nullcontext():
                value = self.elbo.differentiable_loss(model, guide, *args, **kwargs)
            value = value.detach() if needs_gradient else value
        elif trained:
            value = loss_with_gradients(self.elbo, model, guide, args, kwargs, trained)
        else:
            value = torch.tensor(float(self.elbo.loss(model, guide, *args, **kwargs)), dtype=torch.float64)
        self._check_finite(value, model, guide, args, kwargs)
        return value

    @staticmethod
    def _check_finite(value: Tensor, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.isfinite(value):
            raise NonFiniteLossError(_culprit(value, model, guide, args, kwargs))


def _culprit(value: Tensor, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The site that made an ELBO NaN or infinite, found by one more run of its programs."""
    message = f"the ELBO is {value.item()}"
    with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        for role, trace in (("guide", guide_trace), ("model", model_trace)):
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and site["value"] is not None:
                    law: Any = site["fn"]
                    log_prob = torch.as_tensor(law.log_prob(site["value"]))
                    if not log_prob.isfinite().all():
                        return f"{message}: site {name!r} of the {role} has a log density that is NaN or infinite"
    return f"{message}, but every site's log density is finite in a second run"
