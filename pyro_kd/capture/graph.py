"""A traced and compiled run: a function of tensors that returns the loss with its gradient, and knows which inputs it fits.

Knows tensors and where they live, but no programs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_kd.capture.compile import compiled, device_of
from pyro_kd.capture.passes.writes import indices_of_written
from pyro_kd.capture.run import Outputs
from pyro_kd.capture.state import Place
from pyro_kd.utils.torch_internals import scaled, storage_id, version_of

__all__ = ["Graph"]


class Graph:
    """A compiled run.

    Args:
        module: the traced function ``(*tensors) -> (loss, *details, [holds], *gradients)``.
        places: where its first inputs live; the remaining inputs are the tensors among the call's arguments.
        fixed: where the tensors live whose values the graph holds, such as a frozen teacher's.
        leaves: the indices of the inputs that the gradients belong to.
        num_details: number of details.
        has_conditions: whether ``holds``, a boolean scalar, is among the outputs.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        places: list[Place],
        fixed: list[Place],
        leaves: list[int],
        num_details: int,
        has_conditions: bool,
    ) -> None:
        self._module: fx.GraphModule | None = module
        self._run: Callable[..., Sequence[Tensor]] = module
        self._places = places
        self._leaves = leaves
        self._num_details = num_details
        self._has_conditions = has_conditions
        self._fixed = fixed
        self._written = indices_of_written(module.graph)
        self._device = device_of(module)
        self.num_operations = len(module.graph.nodes)
        self._fits: list[Any] = []
        self._overlaps: list[int] = []
        self._fixed_tensors: list[Tensor] = []
        self._fixed_state: list[Any] = []
        self._norms: list[tuple[Tensor, float]] = []
        self._turn = 0
        self._overwrites = False  # whether each call overwrites the outputs of the previous one

    def compile(self, tensors: Sequence[Tensor], options: Mapping[str, Any]) -> None:
        """Compile for inputs of these shapes, dtypes, devices and flags.

        Args:
            tensors: the tensors among the arguments, of any shapes.
            options: see :func:`~pyro_kd.capture.compile.compiled`.
        """
        inputs = self.inputs(tensors)
        self._overlaps = self._in_written_memory(inputs)
        self._fits, self._fixed_tensors = _properties(inputs), [place.tensor() for place in self._fixed]
        self._fixed_state = _states(self._fixed_tensors)
        self._norms = [(tensor, norm) for tensor in self._fixed_tensors if (norm := _norm(tensor)) is not None]
        assert self._module is not None, "compiled once"
        self._run, self._overwrites = compiled(self._module, inputs, inputs[: len(self._places)], options)
        self._module = None

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All current inputs: those that live in modules and the store, then the given tensors among the arguments.

        Raises:
            KeyError: a parameter is no longer in the store.
        """
        return [place.holder[place.name] for place in self._places] + list(tensors)

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the graph was compiled for such inputs."""
        if len(set(map(id, inputs))) < len(inputs):  # two inputs have become the same tensor, as by tying parameters
            return False
        return _properties(inputs) == self._fits and self._in_written_memory(inputs) == self._overlaps

    def _in_written_memory(self, inputs: Sequence[Tensor]) -> list[int]:
        """Which inputs, by their numbers, lie in memory that a run writes to. Compiled code may read the others after it."""
        if not self._written:
            return []
        numbers = list(map(storage_id, inputs))
        written = {numbers[index] for index in self._written}
        return [index for index, number in enumerate(numbers) if number in written]

    def is_current(self) -> bool:
        """Whether the tensors whose values the graph holds are still there, and unchanged.

        A write through ``tensor.data`` can only be seen in the values, and the graph may hold a copy of them in a different memory
        order. So each call compares the norm of one tensor, in turn. A write to all tensors is found in the next call.

        Raises:
            KeyError: a parameter is no longer in the store.
        """
        for place, tensor in zip(self._fixed, self._fixed_tensors, strict=True):
            if place.holder[place.name] is not tensor:
                return False
        if self._norms:
            self._turn = (self._turn + 1) % len(self._norms)
            tensor, norm = self._norms[self._turn]
            if _norm(tensor) != norm:
                return False
        return _states(self._fixed_tensors) == self._fixed_state

    def undo(self, inputs: Sequence[Tensor]) -> Callable[[], None]:
        """A function that undoes the effects of the next run on the random stream and on inputs, in case a guard does not hold."""
        if not self._has_conditions or self._device.type != "cpu":
            return lambda: None
        stream, values = torch.get_rng_state(), [(tensor, tensor.clone()) for tensor in self.written(inputs)]

        @torch.no_grad()
        def take_back() -> None:
            torch.set_rng_state(stream)
            for tensor, value in values:
                tensor.copy_(value)

        return take_back

    def written(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Those of the given inputs that a run writes to."""
        return [inputs[index] for index in self._written]

    def __call__(self, inputs: Sequence[Tensor], notes: Any = None) -> Outputs:
        """Run the graph on all inputs."""
        if self._leaves:
            loss, *rest = _Differentiable.apply(self, inputs, *[inputs[index] for index in self._leaves])  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                loss, *rest = self.run(inputs)
        holds = rest.pop() if self._has_conditions else None
        return Outputs(loss, tuple(rest), holds, notes)

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The outputs for these inputs, in memory that no later call writes to."""
        outputs = self._run(*inputs)
        if not self._overwrites:
            return outputs
        values, grads = outputs[: self.num_values], outputs[self.num_values :]
        return [*(value.clone() for value in values), *scaled(list(grads), 1.0)]

    @property
    def num_values(self) -> int:
        """Number of outputs that are not gradients."""
        return 1 + self._num_details + self._has_conditions


class _Differentiable(torch.autograd.Function):
    """The loss of a graph as a differentiable function; the graph computes loss and gradient together."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, inputs: Sequence[Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = graph.run(inputs)
        values = outputs[: graph.num_values]
        ctx.grads = outputs[graph.num_values :]
        ctx.mark_non_differentiable(*values[1:])
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        if ctx.grads is None or torch.is_grad_enabled():  # the latter with create_graph=True
            raise RuntimeError("a captured loss can only be differentiated once: call it again, or do not compile() it")
        grads, ctx.grads = ctx.grads, None
        if grad is None:
            return (None, None, *[None for _ in grads])
        if grad.device.type != "cpu" or grad.item() != 1.0:
            grads = scaled(list(grads), grad)
        return (None, None, *grads)


def _properties(inputs: Sequence[Tensor]) -> list[Any]:
    """What a graph is compiled for, by input."""
    return [(x.shape, x.dtype, x.device, x.requires_grad, x.stride()) for x in inputs]


@torch.no_grad()
def _norm(tensor: Tensor) -> float | None:
    """The norm of a tensor on a CPU, where no call has to wait for it. None on all other devices, or if it is not finite."""
    if tensor.device.type != "cpu" or not tensor.is_floating_point():
        return None
    norm = float(torch.linalg.vector_norm(tensor))
    return norm if math.isfinite(norm) else None


def _states(constants: Sequence[Tensor]) -> list[Any]:
    """What changes when a tensor is written to."""
    return [(version_of(x), x.data_ptr(), x.dtype) for x in constants]
