"""Values of tensors that become shapes or Python numbers in a traced run, and are constants of the trace.

``x[mask]`` has as many rows as the mask selects, ``x.split(lengths.tolist())`` as many parts as there are lengths. A trace contains
the sizes of one run, and would silently use them in all calls. :class:`Sizes` notes each tensor that determines such a size. If the
tensor is computed from constants only, the trace is valid. If it is computed from tensors that stay, such as a buffer, the trace is
valid until one of these is written to. If it depends on the arguments, on what is trained, or on a draw, there is no graph.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from pyro_kd.capture.passes.writes import writers_of_memory
from pyro_kd.utils.locations import line_at_work
from pyro_kd.utils.torch_internals import DisableTorchFunction, TorchDispatchMode, disable_current_modes

__all__ = ["DataDependentError", "Read", "Sizes", "deciding_inputs"]

aten = torch.ops.aten

# By operation, the arguments that determine the size of its result. For other operations with the tag, all arguments do.
_DECIDING: dict[Any, Sequence[int]] = {
    aten.masked_select: (1,),
    aten.repeat_interleave: (0,),
    aten._ctc_loss: (2, 3),
    aten._pack_padded_sequence: (1,),  # does not have the tag, nor do the next ones
    aten.to_sparse: (0,),
    aten._to_sparse: (0,),
}
# Tags of operations that read values, such as item() of a constant, which a trace can answer.
_READING = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_TO_PYTHON: Any = {
    *(Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__deepcopy__, Tensor.__reduce_ex__),
    *(torch.from_dlpack, torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor),  # type: ignore[attr-defined]
    *(torch.tensor_split, Tensor.tensor_split),
}
_LENDING: Any = {Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}


class DataDependentError(RuntimeError):
    """A run whose shapes or numbers depend on the data."""


class Lent(NamedTuple):
    """A tensor whose memory was given away, such as to NumPy, with its bytes at that time, and the line that did."""

    tensor: Tensor
    content: bytes
    where: str


class Read(NamedTuple):
    """A tensor whose values a run has turned into a shape or a Python number, and the line that did."""

    tensor: Tensor
    where: str


class Sizes:
    """While active, notes the tensors that determine shapes of results or Python numbers.

    Attributes:
        reads: these tensors, of any shapes, with the lines that read them.
    """

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self._lent: list[Lent] = []

    def __enter__(self) -> "Sizes":
        self._under = ExitStack()
        self._under.enter_context(_Shapes(self.reads))
        self._under.enter_context(_Numbers(self.reads, self._lent))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._under.__exit__(*exception)

    def check_lent(self) -> None:
        """Raise DataDependentError where a tensor has changed whose memory NumPy shares: a graph would not change it."""
        with disable_current_modes(), DisableTorchFunction():
            for tensor, content, where in self._lent:
                if _bytes_of(tensor) != content:
                    raise DataDependentError(
                        f"the program gives the memory of a tensor to NumPy{where}, and it changes after that, which a graph cannot "
                        "follow. Make the array first, and the tensor from it: torch.tensor(array)."
                    )


class _Shapes(TorchDispatchMode):
    """Notes tensors whose values determine the shape of an operation's result."""

    def __init__(self, reads: list[Read]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _deciding(func, args):
            self._reads.append(Read(tensor, line_at_work()))
        return result


class _Numbers(TorchFunctionMode):
    """Notes tensors that functions of torch turn into numbers without an operation on tensors."""

    def __init__(self, reads: list[Read], lent: list[Lent]) -> None:
        super().__init__()
        self._reads = reads
        self._lent = lent

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TO_PYTHON:
            self._reads += [Read(tensor, line_at_work()) for tensor in _turned_into_numbers(func, args)]
        if func in _LENDING:
            with disable_current_modes(), DisableTorchFunction():
                self._lent.append(Lent(args[0], _bytes_of(args[0]), line_at_work()))
        return func(*args, **(kwargs or {}))


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _turned_into_numbers(func: Any, args: Any) -> list[Tensor]:
    # These copy a tensor, but read the values of tensors in a list.
    if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
        data = args[1 if func is Tensor.new_tensor else 0 :][:1]
        return [] if isinstance(data[0], Tensor) else list(_tensors(data))
    if func in (torch.tensor_split, Tensor.tensor_split):
        return [arg for arg in args[1:2] if isinstance(arg, Tensor)]
    return [arg for arg in args[:1] if isinstance(arg, Tensor)]


def deciding_inputs(reads: Sequence[tuple[Any, str]], may_change: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The inputs and constants of a graph that its shapes and numbers are computed from.

    Args:
        reads: the nodes of the tensors that determine shapes and numbers, with the lines that read them.
        may_change: whether an input may differ in the next call.

    Raises:
        DataDependentError: one of the tensors depends on an input that may change, or on a draw.
    """
    found, writers = set[fx.Node](), dict[int, list[fx.Node]]()
    for node, where in reads:
        if not isinstance(node, fx.Node):
            continue  # not a tensor of the graph
        writers = writers or writers_of_memory(node.graph)
        for source in _sources(node, writers):
            if source.op == "call_function" or may_change(source):
                raise DataDependentError(
                    f"shapes or numbers{where} depend on the values of a tensor, which may differ in the next call. Use "
                    "torch.where or multiply by a mask, so that shapes do not change; or pass the values as Python numbers in the "
                    "arguments."
                )
            found.add(source)
    return found


def _sources(node: fx.Node, writers: Mapping[int, Sequence[fx.Node]]) -> Iterator[fx.Node]:
    """The inputs, constants and draws that a node is computed from, also through what is written to its memory."""
    todo, seen = [node], {node}
    while todo:
        node = todo.pop()
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            yield node
            continue
        parts = [*node.all_input_nodes, *writers.get(node.meta.get("memory", -1), ())]
        new = [inner for inner in parts if inner not in seen]
        seen.update(new)
        todo += new


def _deciding(func: Any, args: Sequence[Any]) -> list[Tensor]:
    packet = getattr(func, "overloadpacket", None)
    if packet is aten.index:
        return [index for index in args[1] if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)]
    if packet in _DECIDING:
        return [args[number] for number in _DECIDING[packet] if number < len(args) and isinstance(args[number], Tensor)]
    return list(_tensors(args)) if _READING.intersection(getattr(func, "tags", ())) else []


def _tensors(values: Collection[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
