"""Whether a student learns: the loss depends on parameters of its own, which the optimiser sees."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pyro.poutine import Trace
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from pyro_kd.errors import NoParametersError, SharedParameterError
from pyro_kd.isolation.reaching import Reached
from pyro_kd.sites.tracing import params_of
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.pyro_internals import HANDLER_STACK
from pyro_kd.utils.tensors import tensors_in

__all__ = [
    "check_parameters_are_reached",
    "check_params_are_captured",
    "check_student_learns",
    "is_capturing_params",
    "lasting",
    "unreached_parameters",
]


def check_student_learns(loss: Tensor) -> None:
    """Raise NoParametersError where a loss depends on nothing that could be trained."""
    if not loss.requires_grad:
        raise NoParametersError(
            "the loss depends on no parameter of the student: it has none, they do not require gradients, or the terms that "
            "they enter have weight 0. Give the student pyro.param or nn.Module parameters (and latent_weight > 0 where only "
            "discrete latents depend on them); to evaluate only, call the loss under torch.no_grad(). If the frozen teacher stands "
            "in the student's place, swap them: SVI(student, teacher, ...), Distiller(student, teacher, ...)."
        )


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
