"""Checks of what a step differentiates: which parameters the loss depends on, and whether their gradients are finite."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_kd.errors import NonFiniteLossError, NoParametersError
from pyro_kd.isolation.reaching import Reached
from pyro_kd.losses.learning import check_store_holds_own, lasting
from pyro_kd.training.objectives import learns_nothing

__all__ = ["check_gradients", "nothing_to_train", "require_trained"]


def nothing_to_train(programs: Iterable[Any]) -> NoParametersError:
    """The error for programs in which there is no parameter to train. It names a tensor that only looks like one."""
    loose = {name: tuple(tensor.shape) for tensor, name in Reached(*programs).parameters().items() if name}
    for name, shape in loose.items():
        last = name.rpartition(".")[2]
        return NoParametersError(
            f"the student computes with {name!r}, a tensor that requires a gradient, but is neither a pyro.param nor in an nn.Module "
            f"that the student calls, so it would not be trained. Make it one of them: {last} = pyro.param({last!r}, "
            f"torch.zeros({shape})) in the program."
        )
    return NoParametersError(
        "the student has no parameter that requires a gradient: give it pyro.param statements or nn.Module parameters. If "
        "the frozen teacher stands in the student's place, exchange them: Distiller(student, teacher, ...)."
    )


def require_trained(
    name: str,
    reached: set[Tensor],
    params: Mapping[str, Tensor],
    displaced: Mapping[str, Tensor],
    again: Callable[[], set[Tensor]],
) -> None:
    """Raise where a loss depends on a parameter that is not trained, or on none that is.

    Args:
        name: of the objective.
        reached: the leaf tensors that its loss depends on.
        params: what is trained, by name.
        displaced: the programs' own tensors in whose place Pyro's store holds others, by name.
        again: the leaf tensors that one more run depends on. A leaf that only one run reaches is made inside the run.

    Raises:
        NoParametersError: the loss depends on a parameter that is not trained, or on none that is.
        SharedParameterError: Pyro's store holds a different tensor under the name of a parameter that the loss depends on.
    """
    check_store_holds_own(reached, displaced)
    missed = lasting(reached - set(params.values()), again)
    if missed:
        raise NoParametersError(
            f"the loss depends on a parameter of shape {tuple(missed.pop().shape)} that is neither a pyro.param nor in an "
            "nn.Module that the student calls, so it would not be trained. Make it one of them."
        )
    if reached.isdisjoint(params.values()):
        raise learns_nothing(f"objective {name!r}")


def check_gradients(params: Mapping[str, Tensor], clip_norm: float | None) -> None:
    """Clip the gradients of parameters.

    Args:
        params: by name.
        clip_norm: largest norm of all gradients together; None does not clip.

    Raises:
        NonFiniteLossError: a gradient is NaN or infinite, or their norm overflows.
    """
    grads = {name: param.grad for name, param in params.items() if param.grad is not None}
    if not grads:
        return
    norm = torch.nn.utils.get_total_norm([grad.coalesce().values() if grad.is_sparse else grad for grad in grads.values()])
    if not torch.isfinite(norm):
        name = next((name for name, grad in grads.items() if not grad.isfinite().all()), None)
        raise NonFiniteLossError(
            "the loss is finite, but the norm of its gradient overflows."
            if name is None
            else f"the loss is finite, but its gradient for parameter {name!r} is not."
        )
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(params.values(), clip_norm, norm)
