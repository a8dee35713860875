"""Records the operations of one run of Python code on tensors as a graph.

Each node says which memory its result lies in, as a number in ``meta["memory"]``, and into which memory it writes, in
``meta["writes"]``: the run itself shows which tensors share memory, which no reading of the graph does for certain.

``make_fx`` of PyTorch does the same, and much more: symbolic shapes, tensors without values, several levels of tracing. It takes
0.4 ms for an operation. This recorder knows the one case that a capture needs, real tensors of fixed shapes, and takes a fraction of
that, so that a capture takes half of the time.

Knows tensors and operations, but no programs.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from pyro_kd.capture.refusal import RefusedError
from pyro_kd.capture.stream_check import StreamCheck
from pyro_kd.utils.torch_internals import (
    FakeTensorMode,
    TorchDispatchMode,
    WeakTensorKeyDictionary,
    can_decompose,
    is_decomposed_by_autograd,
    lazy_graph_module,
    schema_arguments,
    storage_id,
)

__all__ = ["record"]

aten = torch.ops.aten

_OF_ONEDNN = (
    "the program differentiates an LSTM of oneDNN, which keeps for its gradient what a graph does not have. Use torch.nn.LSTM as it "
    "is, without TorchScript; or torch.backends.mkldnn.enabled = False."
)


def record(
    run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], rewritten: Mapping[Any, Callable[..., Any]]
) -> fx.GraphModule:
    """The graph of a run: a function of the inputs that returns the outputs of the run.

    Each node has in ``meta["val"]`` a tensor without values, of the shape, strides, dtype and device of its result.

    Args:
        run: ``f(*inputs)``. Tensors that it reaches by itself become attributes of the graph.
        inputs: tensors of any shapes.
        rewritten: by operation, a function that replaces it.

    Raises:
        RuntimeError: the run reads the value of a tensor.
        RefusedError: it does what a graph cannot do: it moves a random stream, has one of its own, assigns ``tensor.data``, makes
            sparse tensors.
    """
    recorder = _Recorder(rewritten, StreamCheck())
    for number, tensor in enumerate(inputs):
        recorder.know_fixed(tensor, recorder.graph.placeholder(f"input_{number}"))
    with _no_autocast_cache(), recorder:
        outputs = list(run(*inputs))
    recorder.streams.check()
    recorder.graph.output([recorder.node_of(tensor) for tensor in outputs])
    return lazy_graph_module(recorder.attributes, recorder.graph)


class _Known(NamedTuple):
    """A tensor's node and memory, and its value where it is a single number that was computed from the program's own numbers.

    Attributes:
        node: the node.
        storage: torch's number of the tensor's storage, which another storage may get once this one is freed.
        memory: our number of it, which no other gets.
        constant: the value.
        num_writes: how often that memory had been written to when the value was noted.
    """

    node: fx.Node
    storage: int
    memory: int
    constant: Tensor | None
    num_writes: int


class _Kind(NamedTuple):
    """What matters of an operation.

    Attributes:
        rewritten: what replaces it.
        is_composite: whether it consists of others.
        reads: whether it reads values.
        draws: whether it draws random numbers.
        changes_shapes: whether it changes the shape of its first argument in place.
        written: the arguments that it writes to, by number and name.
    """

    rewritten: Callable[..., Any] | None
    is_composite: bool
    reads: bool
    draws: bool
    changes_shapes: bool
    written: Sequence[tuple[int, str]]


class _Recorder(TorchDispatchMode):
    """The mode in which every operation, below autograd, becomes a node of a graph.

    Attributes:
        graph: the nodes so far.
        attributes: the tensors that are neither inputs nor results of an operation, by name.
        streams: the random streams.
    """

    def __init__(self, rewritten: Mapping[Any, Callable[..., Any]], streams: StreamCheck) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.attributes: dict[str, Tensor] = {}
        self.streams = streams
        self._rewritten = rewritten
        self._known: Any = WeakTensorKeyDictionary()  # weak, or the run would keep all of its memory
        self._forms: dict[Any, Tensor] = {}
        self._kinds: dict[Any, _Kind] = {}
        self._memories = count()
        self._fixed: dict[int, int] = {}  # memory by storage, of tensors that live as long as the recorder
        self._num_writes = Counter[int]()
        self._detached = set[fx.Node]()

    def know_fixed(self, tensor: Tensor, node: fx.Node) -> _Known:
        """Note that a node is a tensor that was there before the run."""
        storage = _storage_of(tensor)
        if storage not in self._fixed:
            self._fixed[storage] = next(self._memories)
        return self._know(tensor, node, storage, self._fixed[storage], None)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor. A tensor that has none becomes an attribute of the graph."""
        return self._known_of(tensor).node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()), [])
        for tensor in tensors:
            if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                return NotImplemented  # a subclass says itself which operations it consists of
        kind = self._kinds.get(func) or self._kind_of(func)
        if kind.rewritten is not None:
            with self:
                return kind.rewritten(*args, **kwargs)
        if kind.is_composite and is_decomposed_by_autograd(func, tensors):  # without autograd, as in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        before = [self._known.get(tensor) for tensor in tensors]
        are_constant = all(map(self._is_constant, before))
        if func is aten.mkldnn_rnn_layer_backward.default:
            raise RefusedError(_OF_ONEDNN)
        if kind.reads:
            if not are_constant:
                raise RuntimeError(f"{func} would get value out of a tracing tensor")
            return self._on_constants(func, tensors, before, args, kwargs)
        known = [self._known_of(tensor) for tensor in tensors]
        if func is aten.detach.default and known[0].node.op == "call_function":
            out = func(*args)
            self._known[out] = known[0]  # it shares its memory
            self._detached.add(known[0].node)
            return out
        if kind.changes_shapes and known[0].node in self._detached:
            raise RefusedError(
                f"the program changes the shape of a tensor in place ({func.overloadpacket.__name__}), of which it has a detached "
                "copy. Leave out the underscore."
            )
        if func is aten.lift_fresh.default:  # of the program's own numbers, to which it may write
            func = aten.lift_fresh_copy.default
        placed, named = _filled_call(args, kwargs, iter([each.node for each in known]))
        node = self.graph.create_node("call_function", func, placed, named, func.overloadpacket.__name__)
        if kind.draws:
            with self.streams.draw(args, kwargs):
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if kind.written:
            self._note_writes(node, kind.written, args, kwargs)
        constant = None
        if func is aten.lift_fresh_copy.default and out.numel() == 1:
            constant = args[0].clone()
        elif are_constant and any(before) and not kind.draws and _are_numbers(out):
            constant = self._on_constants(func, tensors, before, args, kwargs)
        self._know_results(out, node, constant, known)
        return out

    def _kind_of(self, func: Any) -> _Kind:
        arguments = enumerate(schema_arguments(func))
        kind = self._kinds[func] = _Kind(
            rewritten=self._rewritten.get(func),
            is_composite=can_decompose(func),
            reads=torch.Tag.data_dependent_output in func.tags,
            draws=torch.Tag.nondeterministic_seeded in func.tags,
            changes_shapes=torch.Tag.inplace_view in func.tags,
            written=[(number, each.name) for number, each in arguments if each.alias_info and each.alias_info.is_write],
        )
        return kind

    def _known_of(self, tensor: Tensor) -> _Known:
        known: _Known | None = self._known.get(tensor)
        if known is None:
            name = f"constant_{len(self.attributes)}"
            self.attributes[name] = tensor
            return self.know_fixed(tensor, self.graph.create_node("get_attr", name))
        if known.storage != storage_id(tensor):
            raise RefusedError(
                "the program assigns tensor.data, which is no operation on tensors. Write to it: tensor.copy_(value)"
            )
        return known

    def _know(self, tensor: Tensor, node: fx.Node, storage: int, memory: int, constant: Tensor | None) -> _Known:
        node.meta["val"], node.meta["memory"] = self._form_of(tensor), memory
        known = self._known[tensor] = _Known(node, storage, memory, constant, self._num_writes[memory])
        return known

    def _is_constant(self, known: _Known | None) -> bool:
        return known is None or (known.constant is not None and known.num_writes == self._num_writes[known.memory])

    def _note_writes(self, node: fx.Node, written: Sequence[tuple[int, str]], args: Any, kwargs: Mapping[str, Any]) -> None:
        values = [args[number] if number < len(args) else kwargs.get(name) for number, name in written]
        memories = {self._known[tensor].memory for tensor in _tensors(values, [])}
        node.meta["writes"] = memories
        self._num_writes.update(memories)

    def _on_constants(
        self, func: Any, tensors: Sequence[Tensor], known: Sequence[_Known | None], args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        """The result of an operation on the constants that its tensors are."""
        constants = iter([tensor if each is None else each.constant for tensor, each in zip(tensors, known, strict=True)])
        placed, named = _filled_call(args, kwargs, constants)
        return func(*placed, **named)

    def _know_results(self, out: Any, node: fx.Node, constant: Any, sources: Sequence[_Known]) -> None:
        if isinstance(out, Tensor):
            storage = _storage_of(out)
            shared = [source.memory for source in sources if source.storage == storage]
            self._know(out, node, storage, shared[0] if shared else next(self._memories), constant)
        elif isinstance(out, list | tuple):
            for number, each in enumerate(out):
                item = self.graph.create_node("call_function", getitem, (node, number))
                self._know_results(each, item, None if constant is None else constant[number], sources)

    def _form_of(self, tensor: Tensor) -> Tensor:
        """A tensor without values, one for all tensors that are alike."""
        form = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        found = self._forms.get(form)
        if found is None:
            with FakeTensorMode():
                found = torch.empty_strided(form[0], form[1], dtype=form[2], device=form[3])
            self._forms[form] = found
        return found


def _storage_of(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided:
        raise RefusedError(
            f"the program makes a tensor of layout {tensor.layout}, which a graph does not have. Make dense ones."
        )
    return storage_id(tensor)


def _tensors(values: Iterable[Any], found: list[Tensor]) -> list[Tensor]:
    """The tensors among the arguments of an operation, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            _tensors(value, found)
    return found


def _filled_call(args: Any, kwargs: Mapping[str, Any], others: Iterator[Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of an operation with something else in place of their tensors, in the order of :func:`_tensors`."""
    return _filled(args, others), {name: _filled(value, others) for name, value in kwargs.items()}


def _filled(value: Any, others: Iterator[Any]) -> Any:
    if isinstance(value, Tensor):
        return next(others)
    if isinstance(value, list | tuple):
        return type(value)([_filled(part, others) for part in value]) if value else value
    return value


def _are_numbers(out: Any) -> bool:
    return all(tensor.numel() == 1 for tensor in _tensors((out,), []))


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Inside the context autocast keeps no casts of weights: a later call would take a tensor of the trace for one of its own."""
    was_on = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_on)
