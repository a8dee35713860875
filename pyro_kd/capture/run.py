"""What is captured: a function of tensors and programs' arguments, and what it returns."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Run", "RunFunction"]


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


RunFunction = Callable[[tuple[Tensor, ...], tuple[Any, ...], dict[str, Any]], Run]
"""``f(extra, args, kwargs)`` runs the programs on their arguments, and on extra tensors of any shapes."""
