"""One run of Python code as a graph of tensor operations, with its gradient.

The code runs once, and below autograd and below every handler a mode records the operations on tensors: draws of random numbers, the
forward and the backward pass. The result is a function of tensors only, which ``torch.compile`` fuses.
(``torch.compile`` itself cannot follow Pyro's handlers.)

Knows a function of tensors, but no programs.
"""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_kd.capture.graph import Graph
from pyro_kd.capture.guards import Answers, TracedGuards
from pyro_kd.capture.lstm import DecomposedLSTMs
from pyro_kd.capture.passes.batch_norm import DECLARED
from pyro_kd.capture.passes.inputs import make_constant, take_reads, tidy
from pyro_kd.capture.passes.settled import drop_settled
from pyro_kd.capture.recorder import record
from pyro_kd.capture.sizes import Sizes
from pyro_kd.capture.state import Place
from pyro_kd.utils.torch_internals import storage_id

__all__ = ["trace"]


def trace(
    run: Callable[..., tuple[Tensor, Sequence[Tensor]]],
    places: Sequence[Place],
    tensors: Sequence[Tensor],
    leaves: Sequence[Tensor],
    answers: Answers,
    frozen: Collection[Tensor] = (),
) -> Graph:
    """Trace a run.

    Args:
        run: ``f(*tensors)`` returns the loss, a scalar, and details. It reaches the tensors of ``places`` by itself.
        places: where the tensors live that it is known to reach; further ones are found.
        tensors: the tensors among the arguments, of any shapes.
        leaves: the tensors, of either kind, with respect to which the loss is differentiated.
        answers: the answers of the guards in an observed run.
        frozen: tensors among those of ``places`` that keep their values.

    Returns:
        The graph, not compiled yet.

    Raises:
        RuntimeError: the run reads the value of a tensor outside of the guards.
        DataDependentError: shapes or numbers in the run depend on the values of tensors that change.
    """
    counts: list[int] = []
    lines: list[str] = []
    are_used: list[bool] = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        with Sizes() as sizes, DecomposedLSTMs(), TracedGuards(answers) as guards:  # the last sees who calls
            loss, details = run(*inputs[len(places) :])
            with _without_hooks(leaves):
                found = torch.autograd.grad(loss, list(leaves), allow_unused=True) if leaves else ()
        sizes.check_lent()
        # A leaf may have no gradient, such as the bias of an energy if only the energy's derivative is part of the loss.
        are_used[:] = [grad is not None for grad in found]
        grads = _apart([grad for grad in found if grad is not None], inputs)
        conditions = [condition.to(loss.device) for condition in guards.conditions]
        holds = [torch.stack(conditions).all()] if conditions else []
        values = [loss.detach(), *[detail.detach() for detail in details], *holds]
        finite = loss.detach().isfinite()
        if loss.device.type != "cpu":  # both are deferred reads there; until they arrive, no bad update may be made
            is_good = finite & holds[0] if holds else finite
            grads = tuple(torch.where(is_good, grad, 0) for grad in grads)
        counts[:] = [len(details), len(conditions)]
        lines[:] = [read.where for read in sizes.reads]
        return [*values, *grads, *(read.tensor for read in sizes.reads)]

    known = [place.tensor() for place in places]
    traced = record(flat, [*known, *tensors], DECLARED)
    deciding = take_reads(traced, lines, [*places, *[None for _ in tensors]], set(map(id, leaves)))
    has_conditions = counts[1] > 0 and drop_settled(traced, 1 + counts[0])
    leaves = list(itertools.compress(leaves, are_used))
    index = {id(tensor): number for number, tensor in enumerate(known)}
    numbers = {index[id(leaf)] for leaf in leaves if id(leaf) in index}
    kept, held = tidy(traced, len(places), numbers)
    inputs = [places[number] for number in kept] + [Place.of(tensor) for tensor in held]
    constants = make_constant(traced, inputs, set(map(id, frozen)))
    inputs = [place for place in inputs if not any(place is constant for constant in constants)]
    found = {id(tensor): number for number, tensor in enumerate([*(place.tensor() for place in inputs), *tensors])}
    return Graph(traced, inputs, [*constants, *deciding], [found[id(leaf)] for leaf in leaves], counts[0], has_conditions)


def _apart(grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copy gradients that share memory with each other or with an input, since each becomes the ``grad`` of a parameter."""
    taken = {storage_id(tensor) for tensor in inputs}
    found = []
    for grad in grads:
        found.append(grad.clone() if storage_id(grad) in taken else grad)
        taken.add(storage_id(found[-1]))
    return tuple(found)


@contextlib.contextmanager
def _without_hooks(leaves: Sequence[Any]) -> Iterator[None]:
    """Remove the hooks of parameters inside the context: they act in the backward pass of each call, and not in the graph."""
    hooks = [leaf._backward_hooks for leaf in leaves]
    for leaf in leaves:
        leaf._backward_hooks = None
    try:
        yield
    finally:
        for leaf, held in zip(leaves, hooks, strict=True):
            leaf._backward_hooks = held
