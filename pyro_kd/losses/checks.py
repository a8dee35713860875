"""What a loss verifies before anything is trained: finite terms, a student that learns, parameters held by one side only."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import unwrap
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from pyro_kd.errors import NonFiniteLossError, NoParametersError, PyroKDError, SharedParameterError
from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.reaching import Reached
from pyro_kd.losses.terms import SiteTerm
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.pyro_internals import HANDLER_STACK
from pyro_kd.utils.tensors import tensors_in

_FREEZE = (
    "Give the teacher parameters of its own: teacher = pyro_kd.freeze(teacher), and, for a student that does not go on from "
    "the teacher's values, pyro.clear_param_store(), before the student is first run."
)

_SWAPPED = (
    "The student is a frozen program: if it is the teacher, swap them: loss(student, teacher), SVI(student, teacher, ...), "
    "Distiller(student, teacher, ...)."
)


def check_finite_terms(terms: Iterable[SiteTerm]) -> None:
    """Raise NonFiniteLossError naming the first site, in execution order, whose term is NaN or infinite."""
    total = 0.0
    for term in terms:
        value = float(term.value.detach())
        total += term.weight * value
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"the loss is {value} from {term.kind} site {term.name!r} on ({term.divergence}); nothing was "
                "trained on it. Usual causes: a teacher's draw outside the student's support, a scale or probability at 0, "
                "a learning rate that is too high. loss.terms(student, teacher, ...) shows the terms. "
                "For a latent, latent_weight={...: 0} leaves it out. For a target whose support depends on discrete latents, make "
                "these latents targets too."
            )
    if not math.isfinite(total):
        raise NonFiniteLossError(f"the loss is {total}, though each site's term is finite: check latent_weight.")


def check_finite_gradients(params: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteLossError naming the first parameter whose gradient is NaN or infinite."""
    grads = [param.grad for param in params.values() if param.grad is not None]
    if not grads or torch.isfinite(torch.nn.utils.get_total_norm(grads)):
        return
    bad = [name for name, param in params.items() if param.grad is not None and not param.grad.isfinite().all()]
    if bad:
        raise NonFiniteLossError(
            f"the loss is finite, but its gradient for parameter {bad[0]!r} is not; nothing was trained on it. Usual causes: "
            "a square root, norm or logarithm at 0 in the student, or an overflow in its network."
        )


def check_student_learns(terms: Iterable[SiteTerm]) -> None:
    """Raise NoParametersError where the terms depend on nothing that could be trained."""
    if not any(term.value.requires_grad for term in terms):
        raise NoParametersError(
            "the loss depends on no parameter of the student: it has none, they do not require gradients, or the terms that "
            "they enter have weight 0. Give the student pyro.param or nn.Module parameters (and latent_weight > 0 where only "
            "discrete latents depend on them); to evaluate only, call the loss under torch.no_grad(). If the frozen teacher stands "
            "in the student's place, swap them: SVI(student, teacher, ...), Distiller(student, teacher, ...)."
        )


@contextmanager
def hint_at_swapped(student: Any) -> Iterator[None]:
    """Add to an error about two programs that do not fit that they may be swapped, where the student is a frozen program."""
    try:
        yield
    except PyroKDError as error:
        if isinstance(unwrap(student), FrozenProgram) and _SWAPPED not in str(error):
            error.args = (f"{error} {_SWAPPED}",)
        raise


def is_capturing_params() -> bool:
    """Whether Pyro's SVI, which trains the parameters that it sees in ``pyro.param`` statements, is at work."""
    return any(isinstance(frame, TraceMessenger) and frame.param_only for frame in HANDLER_STACK)


def lasting(leaves: set[Tensor], again: Callable[[], set[Tensor]]) -> set[Tensor]:
    """Those of a run's leaves that another run reaches too.

    The others are made inside of a run: by a program that differentiates an energy, or computes with a copy of its module.

    Args:
        leaves: leaf tensors that a run has reached.
        again: gives the leaves that another run reaches, which has no effect.
    """
    return leaves & again() if leaves else leaves


def check_parameters_are_reached(
    values: Iterable[Tensor],
    params: Mapping[str, Tensor],
    student: Any,
    arguments: Any,
    again: Callable[[], set[Tensor]],
) -> None:
    """Raise where a loss has a gradient, and none of it is a parameter's.

    Args:
        values: the loss, or terms of it.
        params: those of ``pyro.param`` statements in the student's run.
        student: the program.
        arguments: of the programs; their gradients may be wanted.
        again: gives the leaves that another run reaches, which has no effect.

    Raises:
        NoParametersError: the loss depends on no tensor that lasts longer than a run.
    """
    reached = leaves_of(values)
    known = Reached(student).parameters() | {tensor: name for name, tensor in params.items() if tensor.requires_grad}
    inputs = leaves_of(tensors_in(arguments))
    if not reached.isdisjoint(known.keys() - inputs) or lasting(reached - inputs, again):
        return
    names = f"such as {next(iter(known.values()))!r}" if known else "of which it has none"
    if reached.isdisjoint(inputs):
        raise NoParametersError(
            f"the loss depends on no parameter of the student, {names}: it depends on tensors that the student makes anew in each "
            "run, by copy.deepcopy(module), torch.tensor(..., requires_grad=True) or detach().requires_grad_(). Compute with the "
            "module's own parameters; to evaluate only, call the loss under torch.no_grad()."
        )
    if known:
        warnings.warn(
            f"the loss depends on its arguments, and on no parameter of the student, {names}: does the student compute with a copy "
            "of its module, or with detached values?",
            stacklevel=2,
        )


def unreached_parameters(values: Iterable[Tensor], student: Any, student_trace: Trace | None = None) -> list[str]:
    """The names of parameters that the student reaches and a loss does not depend on: these are not trained.

    Args:
        values: the loss, or the values of its terms of a weight other than 0.
        student: the program.
        student_trace: its trace, for its ``pyro.param`` statements.
    """
    reached = leaves_of(values)
    found = Reached(student).parameters()
    for name, tensor in params_of(student_trace).items() if student_trace is not None else ():
        if tensor.requires_grad:
            found.setdefault(tensor, name.replace("$$$", "."))
    return [name for tensor, name in found.items() if tensor not in reached]


def check_params_are_captured(
    loss: Tensor, params: Mapping[str, Tensor], arguments: Any, again: Callable[[], set[Tensor]]
) -> None:
    """Raise where SVI would train none, or other tensors than those that the student computes with.

    Args:
        loss: of a run.
        params: those that SVI trains.
        arguments: of the programs.
        again: gives the leaves that another run reaches, which has no effect.

    Raises:
        SharedParameterError: the store holds another tensor under the name of a student's parameter.
        NoParametersError: a module of the student is not registered with Pyro.
    """
    reached = leaves_of([loss]) - leaves_of(tensors_in(arguments))
    missed = lasting(reached - set(params.values()), again)
    if not missed:
        return
    shape = tuple(next(iter(missed)).shape)
    idle = [name for name, value in params.items() if value not in reached]
    if idle:
        raise SharedParameterError(
            f"Pyro's parameter store holds another program's tensor under the name {idle[0].replace('$$$', '.')!r}, so that SVI "
            f"would not train the student's own parameter of shape {shape}. After teacher = pyro_kd.freeze(teacher), call "
            "pyro.clear_param_store() before the student is first run, or give the student's module another name."
        )
    raise NoParametersError(
        f"the loss depends on a parameter of shape {shape} that SVI does not see and would not train. Register its module in the "
        "student: pyro.module('net', net); or train with a torch optimiser: loss(student, teacher)(...).backward()."
    )


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
                f"parameter {name.replace('$$$', '.')!r} belongs to both teacher and student: they use one name in Pyro's "
                f"parameter store, or one module. {_FREEZE}"
            )


def check_no_shared_leaves(student_trace: Trace, teacher_leaves: set[Tensor], student: Any, teacher: Any) -> None:
    """Raise SharedParameterError where the densities of both programs depend on one tensor.

    Finds what :func:`check_no_shared_parameters` cannot see: modules that functions reach through their closures.

    Args:
        student_trace: trace of the student, run with gradients.
        teacher_leaves: :func:`leaves_of_densities` of the teacher.
        student, teacher: the programs, to look up the tensor's name.
    """
    for leaf in leaves_of_densities(student_trace) & teacher_leaves:
        name = pyro.get_param_store().param_name(leaf) or _module_name(leaf, student) or _module_name(leaf, teacher)
        shown = f"parameter {name.replace('$$$', '.')!r}" if name else f"a parameter of shape {tuple(leaf.shape)}"
        raise SharedParameterError(f"{shown} belongs to both teacher and student: both programs compute with it. {_FREEZE}")


def leaves_of_densities(trace: Trace) -> set[Tensor]:
    """The leaf tensors that the densities at a trace's sample sites are differentiable functions of.

    The trace must come from a run with gradients.
    """
    with torch.enable_grad():
        return leaves_of(_densities(trace))


def leaves_held_by(fn: Any) -> set[Tensor]:
    """The leaf tensors with a gradient that a distribution holds itself."""
    return {tensor for tensor in tensors_in(vars(fn)) if tensor.is_leaf and tensor.requires_grad}


def params_of(trace: Trace) -> dict[str, Tensor]:
    """The unconstrained leaf tensors of a trace's ``pyro.param`` statements, by name."""
    values: dict[str, Any] = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "param"}
    # With Pyro's module_local_params the statement carries the parameter itself.
    return {name: value.unconstrained() if hasattr(value, "unconstrained") else value for name, value in values.items()}


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
