"""What is captured: a function of tensors and of the programs' arguments; what it returns, and what a call returns."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Outputs", "Run", "RunFunction"]


@dataclass(frozen=True, slots=True)
class Run:
    """What the captured function returns.

    Attributes:
        loss: the loss, a differentiable scalar.
        details: further tensors of any shapes that the caller wants, without gradients.
        leaves: the tensors with respect to which the loss is differentiated.
        params: names of the ``pyro.param`` statements that the run executed.
        notes: any object that should be returned with the outputs; a graph returns that of the run that was traced.
        form: what must be equal in each run with all checks, besides the loss and the details.
    """

    loss: Tensor
    details: Sequence[Tensor] = ()
    leaves: Iterable[Tensor] = ()
    params: Sequence[str] = ()
    notes: Any = None
    form: Hashable = None


class Outputs(NamedTuple):
    """What a call returns, from a graph or from a run without one.

    Attributes:
        loss: the loss, a scalar that is differentiable with respect to what it depends on.
        details: the details of the run, tensors of any shapes without gradients.
        holds: whether all guards of the graph hold, a boolean scalar; None if there are no guards.
        notes: the notes of the run that was captured, or of this run if there is no graph.
        is_from_graph: whether a graph has run; otherwise the programs themselves have run, with all their checks.
    """

    loss: Tensor
    details: tuple[Tensor, ...]
    holds: Tensor | None
    notes: Any
    is_from_graph: bool = True

    @property
    def is_valid(self) -> bool:
        """Whether the outputs count: if a guard failed, they are void. Waits for the device."""
        return self.holds is None or bool(self.holds)

    @classmethod
    def of(cls, run: Run) -> "Outputs":
        """The outputs of a run without a graph."""
        return cls(run.loss, tuple(run.details), None, run.notes, False)


RunFunction = Callable[[tuple[Tensor, ...], tuple[Any, ...], dict[str, Any], Any], Run]
"""``f(tensors, args, kwargs, static)`` runs the programs on their arguments.

``tensors``, of any shapes, are further inputs of the run; ``static`` is everything else that it depends on.
"""
