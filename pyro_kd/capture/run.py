"""What is captured: a function of tensors and programs' arguments, what it returns, and what a call gets back."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Outputs", "Run", "RunFunction"]


@dataclass(frozen=True, slots=True)
class Run:
    """What the captured function returns.

    Attributes:
        loss: scalar, differentiable.
        details: tensors of any shapes besides it that the caller wants, without gradients.
        leaves: the tensors that the loss is differentiated by.
        params: names of the ``pyro.param`` statements that the run met.
        notes: whatever the outputs are to carry along.
    """

    loss: Tensor
    details: Sequence[Tensor] = ()
    leaves: Iterable[Tensor] = ()
    params: Sequence[str] = ()
    notes: Any = None


class Outputs(NamedTuple):
    """What a call returns, from a graph or from a run without one.

    Attributes:
        loss: scalar, differentiable with respect to what the loss depends on.
        details: whatever else the run returned, tensors of any shapes without gradients.
        holds: boolean scalar: whether all guards of the graph hold; None where there are none.
        notes: of the run that was captured, or of this one.
        is_from_graph: whether a graph has run; else its checks are those of the programs' own run.
    """

    loss: Tensor
    details: tuple[Tensor, ...]
    holds: Tensor | None
    notes: Any
    is_from_graph: bool = True

    @classmethod
    def of(cls, run: Run) -> "Outputs":
        """The outputs of a run without a graph."""
        return cls(run.loss, tuple(run.details), None, run.notes, False)


RunFunction = Callable[[tuple[Tensor, ...], tuple[Any, ...], dict[str, Any], Any], Run]
"""``f(tensors, args, kwargs, static)`` runs the programs on their arguments.

``tensors``, of any shapes, are further inputs of the run; ``static`` is whatever else it depends on.
"""
