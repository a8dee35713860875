"""A warning where student and teacher are in different train or eval modes, and the mode changes the student's program."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import unwrap
from torch import nn

from pyro_kd.isolation.copying import is_library
from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.modes import in_mode
from pyro_kd.isolation.reaching import Reached
from pyro_kd.losses.terms import SiteTerm

__all__ = ["warn_of_modes"]


def warn_of_modes(student: Any, teacher: Any, run: Callable[[], list[SiteTerm]]) -> None:
    """Warn where the student is not in the teacher's mode, and would be a different program in it.

    The layers of torch and Pyro do not count: what batch norm and dropout do in train mode is known. Nothing is run unless the code
    of a user's module reads its mode.

    Args:
        student, teacher: the programs.
        run: returns the terms of a run of both; it has no side effects.
    """
    training = _mode_of_teacher(teacher)
    reached = Reached(student)
    if training is None or "training" not in reached.words:
        return
    modules = [module for module in reached.modules if _asks_for_mode(module) and module.training != training]
    if not modules:
        return
    try:
        with torch.no_grad():
            terms = run()
            with in_mode(training, modules):
                others = {term.name: term.value for term in run()}
    # A student that cannot run in the teacher's mode was not meant for it; an error in its own mode comes up in the actual run.
    except Exception:
        return
    for term in terms:
        other = others.get(term.name)
        if other is None or not torch.allclose(term.value, other, rtol=1e-4, equal_nan=True):  # rounding does not count
            own, theirs = ("eval", "train") if training else ("train", "eval")
            warnings.warn(
                f"the student is in {own} mode and the teacher in {theirs} mode, and the mode changes the student's program: "
                f"its term at site {term.name!r} is {float(term.value):.4g}, and in {theirs} mode it would "
                f"be {'absent' if other is None else f'{float(other):.4g}'}. If the modes should agree, call .{theirs}() on the "
                "student's modules, or keep the teacher's mode: freeze(model, keep_modes=True).",
                stacklevel=2,
            )
            return


def _mode_of_teacher(teacher: Any) -> bool | None:
    """Whether a teacher runs in train mode; None where it has no modules."""
    frozen = unwrap(teacher)
    if isinstance(frozen, FrozenProgram):
        return frozen.training if frozen.modules_held else None
    return False if Reached(teacher).modules else None


def _asks_for_mode(module: nn.Module) -> bool:
    return not is_library(type(module).__module__) and hasattr(module, "training")
