"""Which parameters belong to which program: none may belong to both, and the teacher's get no gradient."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn

from pyro_kd.errors import SharedParameterError
from pyro_kd.isolation.effects import without_effect
from pyro_kd.isolation.freezing import FrozenProgram, is_frozen
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.losses.program_pair import ProgramPair
from pyro_kd.noise.messengers import ReplayNoiseMessenger
from pyro_kd.noise.record import NoiseRecord
from pyro_kd.sites.pairing import SitePair
from pyro_kd.sites.tracing import get_trace, params_of
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.pyro_internals import dotted_name
from pyro_kd.utils.tensors import tensors_in

__all__ = ["check_no_shared_leaves", "check_no_shared_parameters", "leaves_held_by", "leaves_of_densities", "teacher_leaves"]

_FREEZE = (
    "Give the teacher its own parameters before the student is first run: teacher = pyro_kd.freeze(teacher), and "
    "pyro.clear_param_store() unless the student should start from the teacher's values."
)


class _Run(Protocol):
    pairs: list[SitePair]
    student: Trace
    teacher: Trace
    noise: NoiseRecord


def teacher_leaves(run: _Run, known: ProgramPair, teacher: Any, args: Any, kwargs: Any) -> set[Tensor]:
    """The parameters that the teacher's distributions depend on or hold.

    These are the parameters of this run's ``pyro.param`` statements, and those that the program reaches without such a statement. To
    find the latter, the teacher runs on its own noise again, with gradients, once per pair of programs and set of sites. A frozen
    teacher has no such parameters, unless it reaches something that could not be copied.

    Args:
        run: the :class:`~pyro_kd.losses.paired_run.PairedRun` of both programs, with gradients.
        known: what is known about the two programs; the result is noted there.
        teacher: the teacher in the form in which it was run.
        args, kwargs: arguments of both programs.

    Raises:
        SharedParameterError: a tensor belongs to both programs.
    """
    sites = tuple(name for name, site in run.teacher.nodes.items() if site["type"] == "sample")
    if sites not in known.teacher_leaves:
        targets = {pair.name: pair.value for pair in run.pairs if pair.is_target}
        frozen = unwrap(known.teacher)
        with (
            frozen.traced() if isinstance(frozen, FrozenProgram) else evaluation_mode(teacher),
            torch.enable_grad(),
            poutine.block(hide_types=["param"]),
            ReplayNoiseMessenger(run.noise),
        ):
            trace = get_trace(poutine.condition(teacher, targets), args, kwargs)
            reached = leaves_of_densities(trace) - leaves_of(tensors_in((args, kwargs)))
        with without_effect(known.student):  # a density may update running averages, as in a flow with batch norm
            check_no_shared_leaves(run.student, reached, known.student, known.teacher)
        known.teacher_leaves = {sites: reached}
    if is_frozen(known.teacher):
        return known.teacher_leaves[sites]
    held = {leaf for pair in run.pairs for leaf in leaves_held_by(pair.p)}
    return known.teacher_leaves[sites] | set(params_of(run.teacher).values()) | held


def check_no_shared_parameters(
    student_trace: Trace, teacher_trace: Trace, student: Callable[..., Any], teacher: Callable[..., Any]
) -> None:
    """Raise SharedParameterError where one tensor is a parameter of both programs."""
    teachers = {id(value) for value in params_of(teacher_trace).values()}
    if isinstance(teacher, nn.Module):
        teachers |= {id(value) for value in teacher.parameters()}
    if not teachers:
        return
    students = list(params_of(student_trace).items())
    if isinstance(student, nn.Module):
        students += list(student.named_parameters())
    for name, value in students:
        if id(value) in teachers:
            raise SharedParameterError(
                f"parameter {dotted_name(name)!r} belongs to both teacher and student: they use the same name in Pyro's "
                f"parameter store, or the same module. {_FREEZE}"
            )


def check_no_shared_leaves(student_trace: Trace, teacher_leaves: set[Tensor], student: Any, teacher: Any) -> None:
    """Raise SharedParameterError where the densities of both programs depend on one tensor.

    Finds what :func:`check_no_shared_parameters` cannot see: modules that functions reach through their closures.

    Args:
        student_trace: trace of the student from a run with gradients.
        teacher_leaves: :func:`leaves_of_densities` of the teacher.
        student, teacher: the programs, used to find the name of the tensor.
    """
    for leaf in leaves_of_densities(student_trace) & teacher_leaves:
        name = pyro.get_param_store().param_name(leaf) or _module_name(leaf, student) or _module_name(leaf, teacher)
        shown = f"parameter {dotted_name(name)!r}" if name else f"a parameter of shape {tuple(leaf.shape)}"
        raise SharedParameterError(f"{shown} belongs to both teacher and student: both programs compute with it. {_FREEZE}")


def leaves_of_densities(trace: Trace) -> set[Tensor]:
    """The leaf tensors that the densities at a trace's sample sites depend on differentiably.

    The trace must come from a run with gradients.
    """
    with torch.enable_grad():
        return leaves_of(_densities(trace))


def leaves_held_by(fn: Any) -> set[Tensor]:
    """The leaf tensors that a distribution holds itself and that require gradients."""
    return {tensor for tensor in tensors_in(vars(fn)) if tensor.is_leaf and tensor.requires_grad}


def _densities(trace: Trace) -> Iterator[Tensor]:
    site: Any
    for site in trace.nodes.values():
        if site["type"] == "sample" and site["value"] is not None:
            try:
                yield site["fn"].log_prob(site["value"]).sum()
            except (AttributeError, KeyError, NotImplementedError, ValueError):  # KeyError: a flow without inverse
                yield site["value"]


def _module_name(leaf: Tensor, program: Any) -> str | None:
    module = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
    if isinstance(module, nn.Module):
        return next((name for name, value in module.named_parameters() if value is leaf), None)
    return None
