"""A distillation loss between two programs as a graph of tensors: what is particular to it, beside :mod:`pyro_kd.capture`."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyro_kd.capture import Capture, Late, Outputs, Run
from pyro_kd.errors import NonFiniteLossError
from pyro_kd.freezing import FrozenProgram
from pyro_kd.losses.checks import check_finite_terms, leaves_of, params_of
from pyro_kd.losses.module import owners
from pyro_kd.losses.selection import Weight
from pyro_kd.losses.terms import SiteTerm

__all__ = ["CapturedLoss"]


class _Notes(NamedTuple):
    """The terms of a loss, whose values a graph returns, and the names of the student's parameters in Pyro's store."""

    terms: list[SiteTerm]
    params: list[str]


class CapturedLoss:
    """One particle of a loss between a student and a teacher, captured.

    Args:
        evaluate: ``f(args, kwargs)`` runs both programs once, with every check, and returns the terms, those of weight 0
            left out, and the student's trace.
        programs: student and teacher.
        what: for messages.
        options: of :meth:`DistillationLoss.compile <pyro_kd.losses.base.DistillationLoss.compile>`.
    """

    def __init__(
        self,
        evaluate: Callable[[tuple[Any, ...], dict[str, Any]], tuple[list[SiteTerm], Any]],
        programs: tuple[Any, Any],
        what: str,
        options: Mapping[str, Any],
    ) -> None:
        self._evaluate = evaluate
        modules = [
            module
            for program in programs
            for owner in owners(program)
            for module in (owner.modules_held if isinstance(owner, FrozenProgram) else [owner])
            if isinstance(module, nn.Module)
        ]
        teachers = [owner for owner in owners(programs[1]) if isinstance(owner, FrozenProgram)]

        def frozen() -> list[Tensor]:
            return [tensor for teacher in teachers for tensor in teacher.tensors()]

        self._capture = Capture(self._run, modules, what, frozen, **options)
        self._names_of_params: list[str] = []
        self._names: list[str] = []  # of the sites with a weight of their own
        self._weights: tuple[tuple[float, ...], Tensor] = (), torch.zeros(0)
        self._late = Late()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], latent_weight: Weight, key: Any) -> Outputs | None:
        """The loss of one particle for these arguments, or None where there is no graph for them.

        Args:
            latent_weight: as the loss has it now.
            key: the loss's other options.

        Raises:
            NonFiniteLossError: it is NaN or infinite. On a GPU an earlier call's, as soon as it is known without waiting for it;
                until then the gradient of such a loss is 0.
        """
        self._late.look()
        weights: tuple[float, ...] = ()
        if isinstance(latent_weight, Mapping):
            self._names = list(latent_weight)
            weights = tuple(map(float, latent_weight.values()))
        elif not callable(latent_weight):
            self._names = []
            weights = (float(latent_weight),)
        is_zero = tuple(weight == 0 for weight in weights)
        key = (key, latent_weight if callable(latent_weight) else None, tuple(self._names), is_zero)
        outputs = self._capture((self._as_tensor(weights),), args, kwargs, key)
        if outputs is None:
            return None
        self._names_of_params = outputs.notes.params
        if outputs.loss.device.type == "cpu":
            _check(outputs)
        else:
            held = outputs._replace(loss=outputs.loss.detach())
            self._late.add(held.loss, lambda loss: self._check_late(held, loss))
        return outputs

    def params(self) -> dict[str, Tensor]:
        """The student's parameters in Pyro's store that the last call's graph computes with, by name."""
        store = pyro.get_param_store()._params
        return {name: store[name] for name in self._names_of_params}

    def _run(self, extra: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        terms, student = self._evaluate(args, kwargs)
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
        return Run(loss, (values,), leaves, params, _Notes([term._replace(value=loss.detach()) for term in terms], params))

    def _as_tensor(self, weights: tuple[float, ...]) -> Tensor:
        if self._weights[0] != weights:
            self._weights = weights, torch.tensor(weights, dtype=torch.float64)
        return self._weights[1]

    def _check_late(self, outputs: Outputs, loss: float) -> None:
        if not math.isfinite(loss) and (outputs.holds is None or outputs.holds):  # otherwise it is another loss
            self._late.clear()
            _check(outputs)


def _check(outputs: Outputs) -> None:
    if not math.isfinite(outputs.loss.item()):
        values = outputs.details[0].unbind()
        check_finite_terms(term._replace(value=value) for term, value in zip(outputs.notes.terms, values, strict=True))
        raise NonFiniteLossError(
            f"the loss is {outputs.loss.item()}, though each site's term is finite: check latent_weight."
        )
