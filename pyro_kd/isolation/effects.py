"""Run programs, or evaluate their distributions, without an effect on modules, buffers and random streams."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import unwrap
from torch import Tensor

from pyro_kd.isolation.copying import Copier
from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.modes import in_mode, keeping_buffers
from pyro_kd.isolation.reaching import Reached
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.randomness import keeping_random_state
from pyro_kd.utils.tensors import tensors_in

__all__ = ["guarded", "reached_again", "undisturbed", "without_effect", "without_history"]


def guarded(teacher: Any, teacher_laws: Iterable[Any], student_laws: Iterable[Any]) -> AbstractContextManager[Any]:
    """Evaluate the teacher's distributions without an effect on the modules in them, such as a flow's.

    Args:
        teacher: the program.
        teacher_laws: its distributions.
        student_laws: the student's: modules that both hold are left alone.
    """
    frozen = unwrap(teacher)
    if isinstance(frozen, FrozenProgram) and not frozen.training:
        return nullcontext()
    students = Reached(*student_laws).modules
    modules = [module for module in Reached(*teacher_laws).modules if module not in students]
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
    with poutine.block(), keeping_buffers(Reached(*programs).modules), keeping_random_state():
        yield
