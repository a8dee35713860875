"""Programs of the kinds that Pyro's tutorials and examples teach, one a module: each has a factory ``program()``.

They are ordinary Pyro models, written without a thought of distillation. ``tests/integration/test_tutorial_programs.py`` distils each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
from pyro import poutine

from pyro_kd import freeze

__all__ = ["Program", "trained"]


@dataclass(frozen=True)
class Program:
    """A teacher, its student, and how to distil the one into the other.

    Attributes:
        teacher: a frozen program.
        student: a program of the same sites, as large or smaller, with parameters of its own.
        args: what both are called with.
        options: of the loss: ``targets`` and others.
        steps: of Adam.
        lr: its learning rate.
    """

    teacher: Callable[..., Any]
    student: Callable[..., Any]
    args: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 40
    lr: float = 0.02


def trained(model: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """The model as a teacher: run once, so that it has its (random) parameters, then frozen; leaves the store empty."""
    poutine.trace(model).get_trace(*args)
    teacher = freeze(model)
    pyro.clear_param_store()
    return teacher
