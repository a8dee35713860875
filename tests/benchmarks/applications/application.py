"""What a benchmark needs to know of one application of the paper."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Application"]


@dataclass(frozen=True)
class Application:
    """A student that learns, and its loss in two ways.

    Attributes:
        name: of the application.
        sizes: of networks and batch, in words.
        student: the networks whose parameters the loss trains.
        library: the differentiable loss as a user of the library writes it, on new noise in each call.
        by_hand: the same loss in plain PyTorch for this one model, as one would write it.
        by_formulas: the same without torch's distributions, where ``by_hand`` has them.
        by_traces: the sites of one trace of each program by Pyro, compared by hand, without shared noise: what Pyro alone costs.
        captured: ``f(**options)`` makes ``library`` anew, captured, with these options of ``compile()``.
        model, guide, args: the student's two programs and their arguments for Pyro's own SVI.
        learning_rate, weight_decay: of Adam, in the paper.
    """

    name: str
    sizes: str
    student: nn.Module
    library: Callable[[], Tensor]
    by_hand: Callable[[], Tensor]
    captured: Callable[..., Callable[[], Tensor]]
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    learning_rate: float
    weight_decay: float = 1e-4
    by_formulas: Callable[[], Tensor] | None = None
    by_traces: Callable[[], Tensor] | None = None
