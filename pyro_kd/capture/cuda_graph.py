"""A function of tensors as one CUDA graph: a single launch, whatever its number of kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_kd.utils.torch_internals import copy_all_

__all__ = ["CUDAGraphFunction"]


class CUDAGraphFunction:
    """Records a function on a CUDA device in its first call, and replays it after that. Each call overwrites the previous outputs.

    torch.compile can do this too, but first reads the function operation by operation. For a program of hundreds of steps, this takes
    longer than most training runs. The random streams advance from call to call, as without a graph. The first call runs the
    function three times; the caller must restore the inputs that it writes to, and the random streams.

    Args:
        function: takes tensors, all on one device, and returns tensors. It may not read values.
        num_fixed: how many of its first inputs stay where they are in memory. If one has moved, the function is recorded again. All
            other inputs are copied in each call.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], num_fixed: int) -> None:
        self._function = function
        self._num_fixed = num_fixed
        self._graph: Any = None
        self._addresses: list[int] = []
        self._given: list[Tensor] = []
        self._outputs: Sequence[Tensor] = ()

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The outputs for these inputs, of the same shapes in every call."""
        fixed, given = list(inputs[: self._num_fixed]), list(inputs[self._num_fixed :])
        addresses = [tensor.data_ptr() for tensor in fixed]
        if self._graph is None or addresses != self._addresses:
            self._record(fixed, given)
            self._addresses = addresses
        if given:
            copy_all_(self._given, given)
        self._graph.replay()
        return self._outputs

    def _record(self, fixed: list[Tensor], given: list[Tensor]) -> None:
        is_first, self._graph, self._outputs = self._graph is None, None, ()  # frees the memory of an earlier recording
        self._given = [tensor.detach().clone() for tensor in given]
        if is_first:
            self._warm_up(fixed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._outputs = self._function(*fixed, *self._given)
        self._graph = graph

    def _warm_up(self, fixed: list[Tensor]) -> None:
        """Run the function once: libraries set up their handles and work space in a first run, which cannot be recorded."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._function(*fixed, *self._given)
        torch.cuda.current_stream().wait_stream(stream)
