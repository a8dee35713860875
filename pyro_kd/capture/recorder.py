"""Records the operations of one run of Python code on tensors as a graph.

``make_fx`` of PyTorch does the same, and much more: symbolic shapes, tensors without values, several levels of tracing. It takes
0.4 ms for an operation. This recorder knows the one case that a capture needs, real tensors of fixed shapes, and takes a fraction of
that, so that a capture takes half of the time.

Knows tensors and operations, but no programs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from pyro_kd.utils.torch_internals import (
    FakeTensorMode,
    TorchDispatchMode,
    WeakTensorKeyDictionary,
    can_decompose,
    is_decomposed_by_autograd,
    is_mutable,
    lazy_graph_module,
    version_of,
)

__all__ = ["record"]

aten = torch.ops.aten


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
    """
    recorder = _Recorder(rewritten)
    for number, tensor in enumerate(inputs):
        recorder.know(tensor, recorder.graph.placeholder(f"input_{number}"))
    with _no_autocast_cache(), recorder:
        outputs = list(run(*inputs))
    recorder.graph.output([recorder.node_of(tensor) for tensor in outputs])
    return lazy_graph_module(recorder.attributes, recorder.graph)


class _Known(NamedTuple):
    """A tensor's node, and its value where it is a single number that was computed from the program's own numbers.

    Attributes:
        node: the node.
        constant: the value.
        version: that of the tensor for which the value holds: a view may be written to.
    """

    node: fx.Node
    constant: Tensor | None
    version: int


class _Kind(NamedTuple):
    """What matters of an operation: what replaces it, whether it consists of others, reads values, draws, or writes."""

    rewritten: Callable[..., Any] | None
    is_composite: bool
    reads: bool
    draws: bool
    writes: bool


class _Recorder(TorchDispatchMode):
    """The mode in which every operation, below autograd, becomes a node of a graph.

    Attributes:
        graph: the nodes so far.
        attributes: the tensors that are neither inputs nor results of an operation, by name.
    """

    def __init__(self, rewritten: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.attributes: dict[str, Tensor] = {}
        self._rewritten = rewritten
        self._known: Any = WeakTensorKeyDictionary()  # weak, or the run would keep all of its memory
        self._forms: dict[Any, Tensor] = {}
        self._kinds: dict[Any, _Kind] = {}

    def know(self, tensor: Tensor, node: fx.Node, constant: Tensor | None = None, *, is_written: bool = False) -> _Known:
        """Note that a node is a tensor, perhaps one that is being written to."""
        node.meta["val"] = self._form_of(tensor)
        version = -1 if constant is None else version_of(tensor) + is_written
        known = self._known[tensor] = _Known(node, constant, version)
        return known

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor. A tensor that has none becomes an attribute of the graph."""
        known: _Known | None = self._known.get(tensor)
        if known is None:
            name = f"constant_{len(self.attributes)}"
            self.attributes[name] = tensor
            known = self.know(tensor, self.graph.create_node("get_attr", name))
        return known.node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()), [])
        for tensor in tensors:
            if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
                return NotImplemented  # a subclass says itself which operations it consists of
        kind = self._kinds.get(func) or self._kind_of(func)
        if kind.rewritten is not None:
            with self:
                return kind.rewritten(*args, **kwargs)
        if kind.is_composite and is_decomposed_by_autograd(func, tensors):  # without autograd, as in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        known = [self._known.get(tensor) for tensor in tensors]
        are_constant = all(map(_is_constant, tensors, known))
        if kind.reads:
            if not are_constant:
                raise RuntimeError(f"{func} would get value out of a tracing tensor")
            return self._on_constants(func, tensors, known, args, kwargs)
        if func is aten.detach.default and known[0] is not None and known[0].node.op == "call_function":
            out = func(*args)
            self._known[out] = known[0]  # it shares its memory
            return out
        if func is aten.lift_fresh.default:  # of the program's own numbers, to which it may write
            func = aten.lift_fresh_copy.default
        nodes = iter(
            [self.node_of(tensor) if each is None else each.node for tensor, each in zip(tensors, known, strict=True)]
        )
        placed, named = _filled_call(args, kwargs, nodes)
        node = self.graph.create_node("call_function", func, placed, named, func.overloadpacket.__name__)
        out = func(*args, **kwargs)
        constant = None
        if func is aten.lift_fresh_copy.default and out.numel() == 1:
            constant = args[0].clone()
        elif are_constant and any(known) and not kind.draws and _are_numbers(out):
            constant = self._on_constants(func, tensors, known, args, kwargs)
        self._know_results(out, node, constant, kind.writes)
        return out

    def _kind_of(self, func: Any) -> _Kind:
        kind = self._kinds[func] = _Kind(
            rewritten=self._rewritten.get(func),
            is_composite=can_decompose(func),
            reads=torch.Tag.data_dependent_output in func.tags,
            draws=torch.Tag.nondeterministic_seeded in func.tags,
            writes=is_mutable(func),
        )
        return kind

    def _on_constants(
        self, func: Any, tensors: Sequence[Tensor], known: Sequence[_Known | None], args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        """The result of an operation on the constants that its tensors are."""
        constants = iter([tensor if each is None else each.constant for tensor, each in zip(tensors, known, strict=True)])
        placed, named = _filled_call(args, kwargs, constants)
        return func(*placed, **named)

    def _know_results(self, out: Any, node: fx.Node, constant: Any, is_written: bool) -> None:
        if isinstance(out, Tensor):
            self.know(out, node, constant, is_written=is_written)
        elif isinstance(out, list | tuple):
            for number, each in enumerate(out):
                item = self.graph.create_node("call_function", getitem, (node, number))
                self._know_results(each, item, None if constant is None else constant[number], is_written)

    def _form_of(self, tensor: Tensor) -> Tensor:
        """A tensor without values, one for all tensors that are alike."""
        form = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        found = self._forms.get(form)
        if found is None:
            with FakeTensorMode():
                found = torch.empty_strided(form[0], form[1], dtype=form[2], device=form[3])
            self._forms[form] = found
        return found


def _is_constant(tensor: Tensor, known: _Known | None) -> bool:
    return known is None or (known.constant is not None and known.version == version_of(tensor))


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
