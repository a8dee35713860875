"""Whether a student learns: the loss must depend on the student's own parameters, and the optimiser must see them."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from typing import Any

from pyro.poutine import Trace
from torch import Tensor

from pyro_kd.errors import NoParametersError, SharedParameterError
from pyro_kd.isolation.reaching import Reached
from pyro_kd.sites.tracing import displaced_params, params_of
from pyro_kd.utils.advice import advice
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.pyro_internals import HANDLER_STACK, collects_params, dotted_name
from pyro_kd.utils.tensors import tensors_in

__all__ = [
    "check_parameters_are_reached",
    "check_params_are_captured",
    "check_store_holds_own",
    "check_student_learns",
    "is_capturing_params",
    "lasting",
    "unreached_parameters",
    "warn_of_other_shapes",
]


def check_student_learns(loss: Tensor) -> None:
    """Raise NoParametersError where a loss, a scalar tensor, depends on nothing that could be trained."""
    if not loss.requires_grad:
        takes_weight = advice().takes("latent_weight")
        weight = " (and latent_weight > 0 where only discrete latents depend on them)" if takes_weight else ""
        raise NoParametersError(
            "the loss depends on no parameter of the student: it has none, they do not require gradients, or the terms that "
            f"they enter have weight 0. Give the student pyro.param or nn.Module parameters{weight}; to evaluate only, call the loss "
            "under torch.no_grad(). If the frozen teacher was passed as the student, swap them: SVI(student, teacher, ...), "
            "Distiller(student, teacher, ...)."
        )


def is_capturing_params() -> bool:
    """Whether Pyro's SVI is running, which trains the parameters that it sees in ``pyro.param`` statements."""
    return any(map(collects_params, HANDLER_STACK))


def lasting(leaves: set[Tensor], again: Callable[[], set[Tensor]]) -> set[Tensor]:
    """Those of a run's leaves that a second run reaches too.

    All others are created during a run, by a program that differentiates an energy, or computes with a copy of its module.

    Args:
        leaves: leaf tensors, of any shapes, that a run has reached.
        again: returns the leaves that a second run reaches; it has no side effects.
    """
    return leaves & again() if leaves else leaves


def check_parameters_are_reached(
    values: Iterable[Tensor],
    params: Mapping[str, Tensor],
    student: Any,
    arguments: Any,
    again: Callable[[], set[Tensor]],
) -> None:
    """Raise where a loss has a gradient, but not with respect to any parameter.

    Args:
        values: the loss, or its terms: scalar tensors.
        params: the parameters of ``pyro.param`` statements in the student's run, by name.
        student: the program.
        arguments: the arguments of the programs, whose gradients may be wanted.
        again: returns the leaves that a second run reaches; it has no side effects.

    Raises:
        NoParametersError: the loss depends on no tensor that lasts longer than a run.
    """
    reached = leaves_of(values)
    known = Reached(student).parameters() | {tensor: name for name, tensor in params.items() if tensor.requires_grad}
    inputs = leaves_of(tensors_in(arguments))
    if not reached.isdisjoint(known.keys() - inputs) or lasting(reached - inputs, again):
        return
    names = f"such as {next(iter(known.values()))!r}" if known else "which has none"
    if reached.isdisjoint(inputs):
        raise NoParametersError(
            f"the loss depends on no parameter of the student, {names}: it depends on tensors that the student creates in each "
            "run, with copy.deepcopy(module), torch.tensor(..., requires_grad=True) or detach().requires_grad_(). Compute with the "
            "module's own parameters; to evaluate only, call the loss under torch.no_grad()."
        )
    if known:
        warnings.warn(
            f"the loss depends on its arguments, but on no parameter of the student, {names}: does the student compute with a copy "
            "of its module, or with detached values?",
            stacklevel=2,
        )


def unreached_parameters(values: Iterable[Tensor], student: Any, student_trace: Trace | None = None) -> list[str]:
    """The names of parameters that the student reaches but a loss does not depend on. They are not trained.

    Args:
        values: scalar tensors: the loss, or the values of its terms whose weight is not 0.
        student: the program.
        student_trace: the student's trace, for its ``pyro.param`` statements.
    """
    reached = leaves_of(values)
    found = Reached(student).parameters()
    displaced = displaced_params(student_trace) if student_trace is not None else {}
    for name, tensor in params_of(student_trace).items() if student_trace is not None else ():
        if tensor.requires_grad and name not in displaced:
            found.setdefault(tensor, dotted_name(name))
    return [name for tensor, name in found.items() if tensor not in reached]


def check_store_holds_own(reached: Set[Tensor], displaced: Mapping[str, Tensor]) -> None:
    """Raise where Pyro's store holds other tensors than those that a program computes with.

    Args:
        reached: the leaf tensors, of any shapes, that a loss depends on.
        displaced: see :func:`~pyro_kd.sites.tracing.displaced_params`.

    Raises:
        SharedParameterError: a tensor of ``displaced`` is reached.
    """
    for name, own in displaced.items():
        if own in reached:
            raise _other_in_store(name)


def _other_in_store(name: str) -> SharedParameterError:
    return SharedParameterError(
        f"Pyro's parameter store holds a different program's tensor under the name {dotted_name(name)!r}, so SVI would not train "
        "the student's own parameter, and a file of the student would hold the other one under that name. After teacher = "
        "pyro_kd.freeze(teacher), call pyro.clear_param_store() before the student is first run, or give the student's module a "
        "different name."
    )


def warn_of_other_shapes(student_trace: Trace) -> None:
    """Warn where Pyro's store gives a ``pyro.param`` statement of the student a tensor of a different shape than it asks for."""
    for name in params_of(student_trace):
        site: Any = student_trace.nodes[name]
        asked: Any = site["args"][1] if len(site["args"]) > 1 else None
        with suppress(Exception):  # a function may rely on what the program has set up
            asked = asked() if callable(asked) and not isinstance(asked, Tensor) else asked
        if isinstance(asked, Tensor) and asked.shape != site["value"].shape and name not in displaced_params(student_trace):
            warnings.warn(
                f"Pyro's parameter store gives the student a tensor of shape {tuple(site['value'].shape)} under the name "
                f"{dotted_name(name)!r}, where it asks for shape {tuple(asked.shape)}: a different program has made it. After "
                "teacher = pyro_kd.freeze(teacher), call pyro.clear_param_store() before the student is first run.",
                stacklevel=2,
            )


def check_params_are_captured(
    loss: Tensor, params: Mapping[str, Tensor], arguments: Any, again: Callable[[], set[Tensor]]
) -> None:
    """Raise where SVI would not train the tensors that the student computes with.

    Args:
        loss: the loss of a run, a scalar tensor.
        params: the parameters that SVI trains, by name.
        arguments: the arguments of the programs.
        again: returns the leaves that a second run reaches; it has no side effects.

    Raises:
        SharedParameterError: the store holds a different tensor under the name of a student's parameter.
        NoParametersError: a module of the student is not registered with Pyro.
    """
    reached = leaves_of([loss]) - leaves_of(tensors_in(arguments))
    missed = lasting(reached - set(params.values()), again)
    if not missed:
        return
    idle = [name for name, value in params.items() if value not in reached]
    if idle:
        raise _other_in_store(idle[0])
    raise NoParametersError(
        f"the loss depends on a parameter of shape {tuple(missed.pop().shape)} that SVI does not see and does not train. Register "
        "its module in the student, with pyro.module('net', net), or train with a torch optimiser: loss(student, "
        "teacher)(...).backward()."
    )
