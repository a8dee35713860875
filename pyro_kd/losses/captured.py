"""A distillation loss between two programs as a graph of tensors: what is particular to it, beside :mod:`pyro_kd.capture`."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_kd.capture import Capture, DeferredReads, Outputs, Run
from pyro_kd.errors import NonFiniteLossError
from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.losses.checks import check_finite_terms, params_of
from pyro_kd.losses.module import owners
from pyro_kd.losses.parameters import ParameterCheck, parameter_checks, raise_for, sites_of
from pyro_kd.losses.targets import Weight
from pyro_kd.losses.terms import SiteTerm
from pyro_kd.utils.autograd import leaves_of

__all__ = ["CapturedLoss"]


class _Notes(NamedTuple):
    """The terms of a loss and the checks of parameters, of which a graph returns the values, and names in Pyro's store."""

    terms: list[SiteTerm]
    checks: list[ParameterCheck]
    params: list[str]


_OF_NO_EFFECT = ("_seen", "_captured", "_compile_options", "latent_weight")
"""Attributes of a loss that its graphs do not depend on, or see in each call."""


class CapturedLoss:
    """One particle of a loss between a student and a teacher, captured.

    Args:
        evaluate: ``f(args, kwargs)`` runs both programs once, with every check, and returns the terms, those of weight 0
            left out, and the student's trace.
        programs: student and teacher.
        loss: the loss, for its options.
        options: of :meth:`DistillationLoss.compile <pyro_kd.losses.base.DistillationLoss.compile>`.
    """

    def __init__(
        self,
        evaluate: Callable[[tuple[Any, ...], dict[str, Any]], tuple[list[SiteTerm], Any]],
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
        store = pyro.get_param_store()._params
        return {name: store[name] for name in self._names_of_params}

    def _run(self, extra: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        terms, student = self._evaluate(args, kwargs)
        checks = parameter_checks(sites_of(student))
        weighted = []
        for term in terms:
            if term.kind == "target":
                weighted.append(term.value)
            elif not len(extra[0]):
                weighted.append(term.weight * term.value)
            else:
                weight = extra[0][self._names.index(term.name) if self._names else 0]
                weighted.append(weight.to(term.value.device, term.value.dtype) * term.value)
        loss = torch.stack(weighted).sum()
        values = torch.stack([term.value.detach() for term in terms])
        params = list(params_of(student))
        leaves = leaves_of([loss]) if torch.is_grad_enabled() else ()
        details = [values]
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
            f"the loss is {outputs.loss.item()}, though each site's term is finite: check latent_weight."
        )
