"""One run of Python code as a graph of tensor operations, with its gradient, compiled.

``make_fx`` runs the code once, below autograd and below every handler, and writes down the operations on tensors: draws of
random numbers, forward and backward pass alike. What remains is a function of tensors alone, which ``torch.compile`` fuses.
(``torch.compile`` itself cannot follow Pyro's handlers.)
"""

import contextlib
import functools
import gc
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_kd.capture.batch_norm import split_sums
from pyro_kd.capture.bernoulli import draw_uniformly
from pyro_kd.capture.decisions import Decisions
from pyro_kd.capture.reach import Place
from pyro_kd.capture.recorded import Recorded
from pyro_kd.capture.sequences import shorten, written_inputs
from pyro_kd.capture.sizes import Sizes, deciding_inputs

__all__ = ["Graph", "Outputs", "trace"]

aten = torch.ops.aten

# Batch norm writes to its running averages, which only these forms of it declare.
_DECOMPOSED: Any = get_decompositions([aten.native_batch_norm, aten.cudnn_batch_norm, aten.miopen_batch_norm])


# Each call checks by itself what a graph was compiled for, so that torch.compile need not. Freezing prepares the weights of a frozen
# teacher once, and computes once what a guide and its model both compute. The wrapper in C++ saves time between small kernels. Moving
# operations to where they are used, for locality, would move the teacher's into the student's, and both would hold their memory.
_LONGEST_COMPILED = 4000  # operations; a step of the hierarchical VAE has 1,800 and takes a minute
_OTHER = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
_CPU = _OTHER | {"freezing": True, "cpp_wrapper": True, "reorder_for_locality": False}


class Outputs(NamedTuple):
    """What a call of a graph returns.

    Attributes:
        loss: scalar, differentiable with respect to the graph's leaves.
        details: whatever the run returned beside it, without gradients.
        holds: whether the decisions hold under which the graph was traced; None where there were none.
        notes: of the captured run.
    """

    loss: Tensor
    details: tuple[Tensor, ...]
    holds: Tensor | None
    notes: Any


class Graph:
    """A compiled run.

    Args:
        module: of ``(*tensors) -> (loss, *details, [holds], *gradients)``.
        places: where its first inputs live; the other inputs are the tensors among the call's arguments.
        fixed: where the tensors live with whose values the graph was made, a frozen teacher's among them.
        leaves: which inputs the gradients belong to, by index.
        num_details: number of details.
        has_conditions: whether there is ``holds``.
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
        self.module: fx.GraphModule | None = module
        self._compiled: Callable[..., Any] = module
        self._places = places
        self._leaves = leaves
        self._num_details = num_details
        self._has_conditions = has_conditions
        self._fixed = fixed
        nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
        written = written_inputs(module.graph)
        self._written = [index for index, node in enumerate(nodes) if node in written]
        self.num_operations = len(module.graph.nodes)
        self._fits: list[Any] = []
        self._fixed_tensors: list[Tensor] = []
        self._fixed_state: list[Any] = []
        self._norms: list[tuple[Tensor, float]] = []
        self._turn = 0
        self._overwrites = False  # what it has returned, in the next call

    def compile(self, tensors: Sequence[Tensor], options: Mapping[str, Any]) -> None:
        """Compile for inputs of these shapes, types, devices and flags.

        Args:
            tensors: those among the arguments.
            options: of ``torch.compile``; with a backend None, it is left out. A mode or options replace the ones chosen here. The
                backend ``"cudagraphs"`` records the graph as it is, without torch.compile; where there is no CUDA, it is None.
        """
        inputs = self.inputs(tensors)
        self._fits, self._fixed_tensors = _properties(inputs), [place.tensor() for place in self._fixed]
        self._fixed_state = _states(self._fixed_tensors)
        self._norms = [(tensor, norm) for tensor in self._fixed_tensors if (norm := _norm(tensor)) is not None]
        options = dict(options)
        backend = options.get("backend", None if self.is_long else "inductor")
        is_cuda = any(tensor.device.type == "cuda" for tensor in inputs)
        self._overwrites = is_cuda and (backend == "cudagraphs" or (backend == "inductor" and _uses_cuda_graphs(options)))
        module = self.module
        assert module is not None, "compiled once"
        if backend is None or backend == "cudagraphs":
            plain = _code_of(module)
            self._compiled = Recorded(plain, len(self._places)) if self._overwrites else plain
            self.module = None
            return
        if self._overwrites:
            for place in self._places:  # parameters, and buffers that the graph writes to: not copied before each run
                torch._dynamo.mark_static_address(place.tensor())
        if backend == "inductor":
            split_sums(module)
            if not (options.get("options") or {}).get("fallback_random"):
                draw_uniformly(module)
            if not options.keys() & {"mode", "options"}:
                options["options"] = _CPU if all(tensor.device.type == "cpu" for tensor in inputs) else _OTHER
        self._compiled = torch.compile(module, dynamic=False, **options)

    @property
    def is_long(self) -> bool:
        """Whether ``torch.compile`` would take too long: its time grows with every operation."""
        return self.num_operations > _LONGEST_COMPILED

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All inputs as they are now.

        Raises:
            KeyError: a parameter of the store is gone.
        """
        return [place.holder[place.name] for place in self._places] + list(tensors)

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the graph was compiled for such inputs."""
        if len(set(map(id, inputs))) < len(inputs):  # two that were one by one, as tied parameters
            return False
        return _properties(inputs) == self._fits

    def is_current(self) -> bool:
        """Whether the tensors that the graph was made with are there, with the values they had.

        A write by ``tensor.data`` leaves no trace but the values, of which a graph may hold a copy in another order. Of one tensor
        a call, in turn, the norm is looked at: a write to all of them is seen at once.

        Raises:
            KeyError: a parameter of the store is gone.
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
        """What takes a run back that is to come, should its decisions not hold: the random stream, and the inputs it writes to."""
        if not self._has_conditions or inputs[0].device.type != "cpu":
            return lambda: None
        stream, values = torch.get_rng_state(), [(tensor, tensor.clone()) for tensor in self.written(inputs)]

        @torch.no_grad()
        def take_back() -> None:
            torch.set_rng_state(stream)
            for tensor, value in values:
                tensor.copy_(value)

        return take_back

    def written(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs that a run writes to."""
        return [inputs[index] for index in self._written]

    def __call__(self, inputs: Sequence[Tensor], notes: Any = None) -> Outputs:
        """Run it on all inputs."""
        if self._leaves:
            loss, *rest = _Differentiable.apply(self, inputs, *[inputs[index] for index in self._leaves])
        else:
            with torch.no_grad():
                loss, *rest = self.run(inputs)
        holds = rest.pop() if self._has_conditions else None
        return Outputs(loss, tuple(rest), holds, notes)

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the module returns, in memory that no later call writes to."""
        outputs: Sequence[Tensor] = self._compiled(*inputs)
        if not self._overwrites:
            return outputs
        values, grads = outputs[: self.num_values], outputs[self.num_values :]
        return [*(value.clone() for value in values), *(torch._foreach_mul(list(grads), 1.0) if grads else ())]

    @property
    def num_values(self) -> int:
        """Number of outputs that are no gradients."""
        return 1 + self._num_details + self._has_conditions


class _Differentiable(torch.autograd.Function):
    """The loss of a graph, whose gradient was computed along with it."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, inputs: Sequence[Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = graph.run(inputs)
        values = outputs[: graph.num_values]
        ctx.grads = outputs[graph.num_values :]
        ctx.mark_non_differentiable(*values[1:])
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("a captured loss can be differentiated once: call it again, or leave compile() away")
        grads, ctx.grads = ctx.grads, None
        if grad is None:
            return (None, None, *[None for _ in grads])
        if grad.device.type != "cpu" or grad.item() != 1.0:
            grads = torch._foreach_mul(grads, grad)
        return (None, None, *grads)


def trace(
    run: Callable[..., tuple[Tensor, Sequence[Tensor]]],
    places: Sequence[Place],
    tensors: Sequence[Tensor],
    leaves: Sequence[Tensor],
    answers: Mapping[Any, Sequence[Any]],
    frozen: Collection[Tensor] = (),
) -> Graph:
    """Write down a run.

    Args:
        run: ``f(*tensors)`` returns the loss and details; it reaches the tensors of ``places`` by itself.
        places: where the tensors live that it is known to reach; others are found.
        tensors: among the arguments.
        leaves: tensors among both that the loss is differentiated by.
        answers: the decisions of an earlier run (:class:`~pyro_kd.capture.decisions.Decisions`).
        frozen: tensors among those of ``places`` that keep their values.

    Raises:
        RuntimeError: the run decides by the value of a tensor.
        DataDependentError: its shapes depend on the values of tensors that change.
    """
    counts: list[int] = []
    lines: list[str] = []
    are_used: list[bool] = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        with Decisions(answers) as decisions, Sizes() as sizes:
            loss, details = run(*inputs[len(places) :])
            with _without_hooks(leaves):
                found = torch.autograd.grad(loss, list(leaves), allow_unused=True) if leaves else ()
        are_used[:] = [
            grad is not None for grad in found
        ]  # not so for the bias of an energy whose derivative the loss is made of
        grads = _apart([grad for grad in found if grad is not None], inputs)
        conditions = [condition.to(loss.device) for condition in decisions.conditions]
        holds = [torch.stack(conditions).all()] if conditions else []
        values = [loss.detach(), *[detail.detach() for detail in details], *holds]
        finite = loss.detach().isfinite()
        if loss.device.type != "cpu":  # where both are looked at one step late, so that the step does not wait
            is_good = finite & holds[0] if holds else finite
            grads = tuple(torch.where(is_good, grad, 0) for grad in grads)
        counts[:] = [len(details), len(conditions)]
        reads = [*sizes.reads, *decisions.reads]
        lines[:] = [read.where for read in reads]
        return [*values, *grads, *(read.tensor for read in reads)]

    known = [place.tensor() for place in places]
    shapes = TracingContext(FakeTensorMode())  # or make_fx makes a mode of its own for each operation
    with _no_collections(), tracing(shapes):
        traced = make_fx(flat, decomposition_table=_DECOMPOSED)(*known, *tensors)
    deciding = _take_reads(traced, lines, [*places, *[None for _ in tensors]], set(map(id, leaves)))
    has_conditions = counts[1] > 0 and _drop_settled(traced, 1 + counts[0])
    leaves = list(itertools.compress(leaves, are_used))
    index = {id(tensor): number for number, tensor in enumerate(known)}
    numbers = {index[id(leaf)] for leaf in leaves if id(leaf) in index}
    kept, held = _tidy(traced, len(places), numbers)
    inputs = [places[number] for number in kept] + [Place({"": tensor}, "") for tensor in held]
    constants = _make_constant(traced, inputs, set(map(id, frozen)))
    inputs = [place for place in inputs if not any(place is constant for constant in constants)]
    found = {id(tensor): number for number, tensor in enumerate([*(place.tensor() for place in inputs), *tensors])}
    if len(traced.graph.nodes) > _LONGEST_COMPILED:
        shorten(traced)
    return Graph(traced, inputs, [*constants, *deciding], [found[id(leaf)] for leaf in leaves], counts[0], has_conditions)


def _take_reads(
    module: fx.GraphModule, lines: Sequence[str], places: Sequence[Place | None], leaves: Collection[int]
) -> list[Place]:
    """Take the last outputs away, the tensors that decide about shapes and numbers. Returns where those live that they are made of.

    Args:
        lines: for each of these outputs, the line that asks.
        places: of the inputs; None for an argument.
        leaves: ids of the tensors that are trained.

    Raises:
        DataDependentError: one is made of what changes from call to call.
    """
    if not lines:
        return []
    output = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    outputs = list(output.args[0])
    output.args = (outputs[: -len(lines)],)
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    place_of = dict(zip(nodes, places, strict=True))
    written = written_inputs(module.graph)

    def may_change(node: fx.Node) -> bool:
        place = place_of.get(node)
        is_argument = node.op == "placeholder" and place is None
        return is_argument or node in written or (place is not None and id(place.tensor()) in leaves)

    sources = deciding_inputs(list(zip(outputs[-len(lines) :], lines, strict=True)), may_change)
    module.recompile()
    return [place_of.get(node) or Place({"": getattr(module, str(node.target))}, "") for node in sources]


def _drop_settled(module: fx.GraphModule, number: int) -> bool:
    """Drop the conditions that hold whatever the inputs are, as that the rows of a plate are all its rows.

    Returns whether others are left; if not, neither is the output of this number.
    """
    graph = module.graph
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    holds = output.args[0][number]
    stack = holds.args[0]
    assert (holds.target, stack.target) == (aten.all.default, aten.stack.default)
    left = [condition for condition in stack.args[0] if not _is_settled(condition, stack)]
    if left:
        stack.args = (left, *stack.args[1:])
    else:
        outputs = list(output.args[0])
        del outputs[number]
        output.args = (outputs,)
        device = holds.meta["val"].device
        with graph.inserting_before(holds):
            true = graph.call_function(aten.full.default, ([], True), {"dtype": torch.bool, "device": device})
        holds.replace_all_uses_with(true)
    module.recompile()
    return bool(left)


def _is_settled(node: fx.Node, end: fx.Node) -> bool:
    """Whether a node depends on nothing that may change, and nothing else can have written to what it was computed from."""
    todo, seen = [node], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node not in seen:
            tags = getattr(node.target, "tags", ())
            if node.op != "call_function" or torch.Tag.nondeterministic_seeded in tags or len(seen) > _MAX_SETTLED:
                return False
            seen.add(node)
            todo += node.all_input_nodes
    return all(user in seen or user is end for node in seen for user in node.users)


_MAX_SETTLED = 30
"""Longer computations are not searched through."""


def _uses_cuda_graphs(options: Mapping[str, Any]) -> bool:
    """Whether options of torch.compile ask for CUDA graphs, whose next run overwrites what a run has returned."""
    if (options.get("options") or {}).get("triton.cudagraphs"):
        return True
    mode = options.get("mode")
    return mode is not None and bool(torch._inductor.list_mode_options(mode).get("triton.cudagraphs"))


def _make_constant(module: fx.GraphModule, places: Sequence[Place], frozen: set[int]) -> list[Place]:
    """Let the module hold those of its first inputs that are frozen, if none of them is written to. Returns where they live."""
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"][: len(places)]
    chosen = [(node, place) for node, place in zip(nodes, places, strict=True) if id(place.tensor()) in frozen]
    if not written_inputs(module.graph).isdisjoint(node for node, _ in chosen):
        return []
    for number, (node, place) in enumerate(chosen):
        module.register_buffer(f"frozen_{number}", place.tensor().detach())
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(f"frozen_{number}")
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
        module.graph.erase_node(node)
    module.recompile()
    return [place for _, place in chosen]


def _tidy(module: fx.GraphModule, num_places: int, needed: Collection[int]) -> tuple[list[int], list[Tensor]]:
    """Drop inputs that are not used, and make inputs of the tensors that were found.

    Returns the numbers of the places that are left, and the tensors found, which follow them.
    """
    graph = module.graph
    graph.eliminate_dead_code()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    kept = []
    for number, node in enumerate(inputs[:num_places]):
        if node.users or number in needed:
            kept.append(number)
        else:
            graph.erase_node(node)
    arguments, held = inputs[num_places:], dict[str, tuple[Tensor, fx.Node]]()
    first = next(iter(arguments), None) or next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if node.op == "get_attr":
            target = str(node.target)
            if target not in held:
                with graph.inserting_before(first):
                    held[target] = getattr(module, target), graph.placeholder(target)
            node.replace_all_uses_with(held[target][1])
            graph.erase_node(node)
    module.recompile()
    return kept, [tensor for tensor, _ in held.values()]


def _apart(grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of which none shares memory with another one or with an input: each becomes the ``grad`` of a parameter."""
    taken = {tensor.untyped_storage()._cdata for tensor in inputs}
    found = []
    for grad in grads:
        found.append(grad.clone() if grad.untyped_storage()._cdata in taken else grad)
        taken.add(found[-1].untyped_storage()._cdata)
    return tuple(found)


@contextlib.contextmanager
def _without_hooks(leaves: Sequence[Any]) -> Iterator[None]:
    """Hooks of parameters act in the backward pass of each call, and not in the graph too."""
    hooks = [leaf._backward_hooks for leaf in leaves]
    for leaf in leaves:
        leaf._backward_hooks = None
    try:
        yield
    finally:
        for leaf, held in zip(leaves, hooks, strict=True):
            leaf._backward_hooks = held


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Without the garbage collector, which goes through all nodes again and again while they are made."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _code_of(module: fx.GraphModule) -> Callable[..., Any]:
    """What the module runs, without the nodes of its graph, of which a long run has hundreds of thousands."""
    holder = nn.Module()
    for name, tensor in module._buffers.items():
        holder.register_buffer(name, tensor)
    return functools.partial(type(module).forward, holder)


def _properties(inputs: Sequence[Tensor]) -> list[Any]:
    """What a graph is compiled for."""
    return [(x.shape, x.dtype, x.device, x.requires_grad, x.stride()) for x in inputs]


@torch.no_grad()
def _norm(tensor: Tensor) -> float | None:
    """The norm of a tensor on a CPU, where no call has to wait for it; None for others, and where it is not finite."""
    if tensor.device.type != "cpu" or not tensor.is_floating_point():
        return None
    norm = float(torch.linalg.vector_norm(tensor))
    return norm if math.isfinite(norm) else None


def _states(constants: Sequence[Tensor]) -> list[Any]:
    """What changes when a tensor gets another value."""
    return [(x._version, x.data_ptr(), x.dtype) for x in constants]
