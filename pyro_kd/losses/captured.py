"""A distillation loss as a compiled graph: what is specific to it, beside :mod:`pyro_kd.capture`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_kd.capture import Capture, DeferredReads, Outputs, Run
from pyro_kd.errors import NonFiniteLossError
from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.programs import owners
from pyro_kd.losses.constraints import ParameterCheck, parameter_checks, raise_for, sites_of
from pyro_kd.losses.finite import check_finite_terms
from pyro_kd.losses.targets import Weight
from pyro_kd.losses.terms import SiteTerm
from pyro_kd.sites.tracing import params_of
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.pyro_internals import unconstrained_params

__all__ = ["CapturedLoss"]


class _Notes(NamedTuple):
    """The terms of all particles and the checks of parameters, of which a graph returns the values, and names in Pyro's store."""

    terms: list[SiteTerm]
    checks: list[ParameterCheck]
    params: list[str]


_OF_NO_EFFECT = ("_pairs", "compile_options", "latent_weight")
"""Attributes of a loss that its graphs do not depend on, or see in each call."""


class CapturedLoss:
    """A loss between a student and a teacher, or one particle of it, captured.

    Args:
        evaluate: ``f(args, kwargs, weigh=...)`` runs both programs with every check, and returns the particles and the loss. It calls
            ``weigh`` for each term, which gives the latent terms weights that are inputs of the graph.
        programs: student and teacher.
        loss: the loss, for its options.
        options: of :meth:`DistillationLoss.compile <pyro_kd.losses.base.DistillationLoss.compile>`.
    """

    def __init__(
        self,
        evaluate: Callable[..., tuple[Sequence[Any], Tensor]],
        programs: tuple[Any, Any],
        loss: Any,
        options: Mapping[str, Any],
    ) -> None:
        self._evaluate = evaluate
        teachers = [owner for owner in owners(programs[1]) if isinstance(owner, FrozenProgram)]

        def frozen() -> list[Tensor]:
            return [tensor for teacher in teachers for tensor in teacher.tensors()]

        self._weight_functions: list[Any] = [None]
        roots = {"student": programs[0], "teacher": programs[1], "loss": loss, "latent_weight": self._weight_functions}
        ignored = [f"loss.{name}" for name in _OF_NO_EFFECT]
        self._capture = Capture(self._run, roots, type(loss).__name__, frozen, ignored, **options)
        self._names_of_params: list[str] = []
        self._names: list[str] = []  # of the sites with a weight of their own
        self._weights: tuple[tuple[float, ...], Tensor] = (), torch.zeros(0)
        self._deferred = DeferredReads()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], latent_weight: Weight) -> Outputs | None:
        """The loss of one particle for these arguments, or None where there is no graph for them.

        Args:
            latent_weight: as the loss has it now.

        Raises:
            InvalidParameterError: a parameter of the student's distributions has left its constraint. On a GPU likewise.
            NonFiniteLossError: it is NaN or infinite. On a GPU an earlier call's, as soon as it is known without waiting for it;
                until then the gradient of such a loss is 0.
        """
        self._deferred.collect()
        weights: tuple[float, ...] = ()
        if isinstance(latent_weight, Mapping):
            self._names = list(latent_weight)
            weights = tuple(map(float, latent_weight.values()))
        elif not callable(latent_weight):
            self._names = []
            weights = (float(latent_weight),)
        is_zero = tuple(weight == 0 for weight in weights)
        self._weight_functions[0] = latent_weight if callable(latent_weight) else None
        key = (latent_weight if callable(latent_weight) else None, tuple(self._names), is_zero)
        outputs = self._capture((self._as_tensor(weights),), args, kwargs, key)
        if outputs is None:
            return None
        self._names_of_params = outputs.notes.params
        if outputs.loss.device.type == "cpu":
            _check(outputs)
        else:
            held = outputs._replace(loss=outputs.loss.detach())
            self._deferred.add(held.loss, lambda loss: self._check_late(held, math.isfinite(loss)))
            if outputs.notes.checks:
                self._deferred.add(held.details[-1], lambda holds: self._check_late(held, holds))
        return outputs

    def params(self) -> dict[str, Tensor]:
        """The student's parameters in Pyro's store that the last call's graph computes with, by name."""
        store = unconstrained_params(pyro.get_param_store())
        return {name: store[name] for name in self._names_of_params}

    def _run(self, extra: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        (weights,) = extra

        def weigh(term: SiteTerm) -> SiteTerm:
            if term.kind == "target" or not len(weights):
                return term
            weight = weights[self._names.index(term.name) if self._names else 0]
            return term._replace(weight=weight.to(term.value.device, term.value.dtype))

        particles, loss = self._evaluate(args, kwargs, weigh=weigh)
        students = [particle.run.student for particle in particles]
        terms = [term for particle in particles for term in particle.terms]
        checks = [check for student in students for check in parameter_checks(sites_of(student))]
        params = list(dict.fromkeys(name for student in students for name in params_of(student)))
        leaves = leaves_of([loss]) if torch.is_grad_enabled() else ()
        details = [torch.stack([term.value.detach() for term in terms])]
        if checks:
            holds = torch.stack([check.holds.to(loss.device) for check in checks])
            details += [holds, holds.all()]
        terms = [term._replace(value=loss.detach()) for term in terms]
        checks = [check._replace(holds=loss.detach()) for check in checks]
        return Run(loss, details, leaves, params, _Notes(terms, checks, params))

    def _as_tensor(self, weights: tuple[float, ...]) -> Tensor:
        if self._weights[0] != weights:
            self._weights = weights, torch.tensor(weights, dtype=torch.float64)
        return self._weights[1]

    def _check_late(self, outputs: Outputs, is_good: bool) -> None:
        if not is_good and (outputs.holds is None or outputs.holds):  # otherwise it is another loss
            self._deferred.clear()
            _check(outputs)


def _check(outputs: Outputs) -> None:
    if outputs.notes.checks and not outputs.details[-1].item():
        raise_for(outputs.notes.checks, outputs.details[1].tolist())
    if not math.isfinite(outputs.loss.item()):
        values = outputs.details[0].unbind()
        check_finite_terms(term._replace(value=value) for term, value in zip(outputs.notes.terms, values, strict=True))
        raise NonFiniteLossError(
            f"the loss is {outputs.loss.item()}, although the term of each site is finite: check combine() or latent_weight."
        )
