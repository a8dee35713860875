"""How a loss leaves teacher and student as they are, but for the student's gradients; and whether their modes agree."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn

from pyro_kd.isolation.copying import Copier, is_library
from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.modes import in_mode, keeping_buffers
from pyro_kd.isolation.reaching import Reached
from pyro_kd.losses.terms import SiteTerm
from pyro_kd.sites.pairing import SitePair
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.randomness import RandomState
from pyro_kd.utils.tensors import tensors_in

__all__ = ["guarded", "reached_again", "undisturbed", "warn_of_modes", "without_effect", "without_history"]


def guarded(teacher: Any, pairs: Iterable[SitePair]) -> AbstractContextManager[Any]:
    """Evaluate the teacher's distributions without an effect on the modules in them, such as a flow's."""
    frozen = unwrap(teacher)
    if isinstance(frozen, FrozenProgram) and not frozen.training:
        return nullcontext()
    pairs = list(pairs)
    students = Reached(*[pair.q for pair in pairs]).modules
    modules = [module for module in Reached(*[pair.p for pair in pairs]).modules if module not in students]
    stack = ExitStack()
    if modules and not isinstance(frozen, FrozenProgram):
        stack.enter_context(in_mode(False, modules))
    if modules:
        stack.enter_context(keeping_buffers(modules))
    return stack


@contextmanager
def undisturbed(student: Any, teacher: Any) -> Iterator[None]:
    """Run both programs outside of a loss as a loss runs them: an unfrozen teacher in eval mode, and no buffer moves."""
    students = Reached(student).modules
    teachers = [module for module in Reached(teacher).modules if module not in students]
    with in_mode(False, teachers), keeping_buffers([*students, *teachers]):
        yield


def without_history(trace: Trace) -> Trace:
    """Cut a teacher's values and distributions off what they were computed from.

    A program that differentiates inside turns gradients on for that, against the loss, which has turned them off.
    """
    site: Any
    for site in trace.nodes.values():
        if site["type"] == "sample":
            if isinstance(site["value"], Tensor) and site["value"].requires_grad:
                site["value"] = site["value"].detach()
            if any(tensor.grad_fn is not None for tensor in tensors_in(getattr(site["fn"], "__dict__", None))):
                site["fn"] = Copier().copy(site["fn"])
    return trace


def reached_again(run: Callable[[], Tensor], *programs: Any) -> set[Tensor]:
    """The leaves that the value of one more run depends on. The run has no effect on its programs."""
    with without_effect(*programs):
        return leaves_of([run()])


@contextmanager
def without_effect(*programs: Any) -> Iterator[None]:
    """Run programs once more, out of sight of Pyro's handlers, and leave random streams and the programs' buffers as they are."""
    before = RandomState.now()
    with poutine.block(), keeping_buffers(Reached(*programs).modules):
        try:
            yield
        finally:
            before.restore()


def warn_of_modes(student: Any, teacher: Any, run: Callable[[], list[SiteTerm]]) -> None:
    """Warn where the student is in another mode than the teacher, and another program in the teacher's mode.

    Torch's and Pyro's own layers do not count: what a batch norm or dropout does in train mode is known. Where no other module's code
    asks for its mode, nothing is run.

    Args:
        student, teacher: the programs.
        run: gives the terms of a run of both, which has no effect.
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
    except (
        Exception
    ):  # then it is no program in the other mode that could have been meant; what is wrong with this one, its run says
        return
    for term in terms:
        other = others.get(term.name)
        if other is None or not torch.allclose(term.value, other, rtol=1e-4, equal_nan=True):  # more than rounding
            own, theirs = ("eval", "train") if training else ("train", "eval")
            warnings.warn(
                f"the student is in {own} mode and the teacher in {theirs} mode, and the mode changes the student's program: "
                f"its loss at site {term.name!r} is {float(term.value):.4g}, and in {theirs} mode it would be "
                f"{'gone' if other is None else f'{float(other):.4g}'}. If the modes should agree, call .{theirs}() on the student's "
                "modules, or keep the teacher's mode: freeze(model, keep_modes=True).",
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
