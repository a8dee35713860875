"""A program as a graph of tensor operations: noise and arguments in, values out, parameters in the state dict.

``torch.export`` runs the program once, on symbols for the number of rows. Every tensor that the program reaches by itself becomes a
constant of the graph; those that are parameters or buffers are made inputs that the state dict fills. Knows functions of tensors,
modules and Pyro's store; no sites.
"""

import builtins
import copy
import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec
from torch.export.passes import move_to_device_pass
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from pyro_kd.errors import PyroKDError, UnsupportedExportError
from pyro_kd.export.description import ROWS, Shape
from pyro_kd.export.stable import stable_laws_traceable
from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.programs import owners
from pyro_kd.isolation.reaching import Reached
from pyro_kd.noise.between import draws
from pyro_kd.utils.pyro_internals import dotted_name, unconstrained_params
from pyro_kd.utils.torch_internals import is_same_storage, set_grad_enabled

__all__ = [
    "Function",
    "called_modules",
    "complete",
    "device_of",
    "known_tensors",
    "moved",
    "quietly",
    "random_operations",
    "trace_graph",
    "unused_inputs",
]

Tensors = Mapping[str, Tensor]
Function = Callable[[Tensors], dict[str, Tensor]]
"""``f(inputs)`` returns the outputs; noise and arguments are inputs, and all have names."""


_SHAPE_ONLY = frozenset(
    ("sym_size", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like")
)
"""Operations that use the shape of a tensor and not its values."""


def device_of(program: ExportedProgram) -> torch.device:
    """Where the parameters and constants of a program are."""
    tensors = [*program.state_dict.values(), *program.constants.values()]
    found = [tensor.device for tensor in tensors if isinstance(tensor, Tensor)]
    return next((device for device in found if device.type != "cpu"), torch.device("cpu"))


def moved(program: ExportedProgram, device: torch.device | str) -> ExportedProgram:
    """A copy of the program on another device."""
    with quietly():
        return move_to_device_pass(copy.deepcopy(program), str(device))


def trace_graph(function: Function, inputs: Tensors, shapes: Mapping[str, Shape]) -> ExportedProgram:
    """Trace a function.

    Args:
        function: the function.
        inputs: examples of its inputs, of any shapes.
        shapes: their shapes by name, with symbols.

    Returns:
        The program, which :func:`complete` makes ready.
    """
    rows = Dim("rows", min=1)
    dims = {name: {dim: rows for dim, size in enumerate(shapes[name]) if size == ROWS} for name in inputs}
    with _refusals(), pyro.validation_enabled(False), _lengths_open(), stable_laws_traceable():
        program = torch.export.export(_Module(function), (dict(inputs),), dynamic_shapes=(dims,), strict=False)
    program.graph.eliminate_dead_code()
    return program


def complete(program: ExportedProgram, known: Mapping[Tensor, str]) -> ExportedProgram:
    """A program without side effects and with weights in the state dict.

    Args:
        program: from :func:`trace_graph`.
        known: parameters and buffers that the program may reach, with their names.

    Returns:
        The program, whose state dict holds copies of the known tensors that it uses. Inverse distribution functions are single
        operations in it: :func:`~pyro_kd.export.inlining.with_plain_operations` makes them plain ones.
    """
    with _refusals():
        program = _with_parameters(program, known).run_decompositions({})
    for node in _nodes(program):  # where the program was written is nobody else's business, and most of a file's bytes
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
            node.meta.pop(key, None)
    return program


@contextmanager
def _refusals() -> Iterator[None]:
    """Work on a graph, without gradients: an error of torch becomes one of the library."""
    with torch.no_grad(), quietly():
        try:
            yield
        except PyroKDError:
            raise
        except Exception as error:
            raise _refusal(error) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Without torch's warnings about its own old interfaces, and without the graphs that it prints before it raises."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), ExitStack() as stack:
        warnings.simplefilter("ignore")
        for name in ("torch.export", "torch._export", "torch.fx", "torch.onnx"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield


@contextmanager
def _lengths_open() -> Iterator[None]:
    """Let ``len(tensor)`` be the symbol of its first size. Python turns it into a number otherwise, and so fixes the size."""

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, Tensor) and value.dim() else _LEN(value)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = _LEN


_LEN = len


def _refusal(error: Exception) -> UnsupportedExportError:
    text = " ".join(str(error).split())
    open_text = re.sub(r"L\['inputs'\]\['[^']*'\]\.size\(\)\[\d+\]", "rows", text)
    guard = re.search(r"generated guard ([^.;]{1,60}?)(?: and rows <= IntInf|[.;])", open_text)
    if "Constraints violated" in text and guard:
        return UnsupportedExportError(
            "the program does something else for other numbers of rows, such as a slice of a fixed length, or a branch on a size: "
            f"its graph would hold for {guard[1].strip()} alone (torch.export). Make it the same for every number of rows, or fix "
            "all sizes: fixed=True."
        )
    if "Constraints violated" in text or "specializ" in text:
        return UnsupportedExportError(
            "the program turns the number of rows into a plain number, by int(), range(), tolist() or a list of that length, so that "
            f"its graph would serve this number alone (torch.export: {text:.200}). Use the size itself, x.shape[0], in tensor "
            "operations and plates, or fix all sizes: fixed=True."
        )
    return UnsupportedExportError(f"torch.export cannot make a graph of the program: {type(error).__name__}: {text:.400}")


class _Module(nn.Module):
    """The form that torch.export takes."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self._function = function
        self.eval()

    def forward(self, inputs: Tensors) -> dict[str, Tensor]:
        with _Traceable():
            return self._function(inputs)


class _Traceable(TorchFunctionMode):
    """Leaves out or replaces what torch cannot trace well.

    A switch of gradients that changes nothing, of which each draw has one, becomes a graph inside of the graph. ``Tensor.data``
    becomes a constant; ``detach`` has the same memory, too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is set_grad_enabled and args[0] is torch.is_grad_enabled():
            return None
        if func == _GET_DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


_GET_DATA = inspect.getattr_static(Tensor, "data").__get__


@contextmanager
def called_modules() -> Iterator[dict[nn.Module, None]]:
    """Collect the modules that are called inside the context, in order."""
    called: dict[nn.Module, None] = {}
    hook = register_module_forward_pre_hook(lambda module, _: called.setdefault(module))
    try:
        yield called
    finally:
        hook.remove()


def known_tensors(program: Any, called: Iterable[nn.Module]) -> dict[Tensor, str]:
    """The parameters and buffers that a program may use, with their names.

    Args:
        program: the program.
        called: modules that it was seen to call.
    """
    found: dict[Tensor, str] = {}
    frozen = [owner for owner in owners(program) if isinstance(owner, FrozenProgram)]
    for store in (*(owner._store for owner in frozen), pyro.get_param_store()):
        for name, tensor in unconstrained_params(store).items():
            found.setdefault(tensor, dotted_name(name))
    reached = Reached(*(owner.program for owner in frozen), program, *called)
    for tensor, name in reached.all_tensors().items():
        found.setdefault(tensor, name)
    return found


def _with_parameters(program: ExportedProgram, known: Mapping[Tensor, str]) -> ExportedProgram:
    """The same program, in which constants that are parameters or buffers belong to the state dict."""
    signature = program.graph_signature
    by_name = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    state: dict[str, Tensor] = dict(program.state_dict)
    constants: dict[str, Any] = {}
    groups: dict[InputKind, list[InputSpec]] = {InputKind.PARAMETER: [], InputKind.BUFFER: [], InputKind.CONSTANT_TENSOR: []}
    rest: list[InputSpec] = []
    first_uses: dict[Tensor, Any] = {}
    for spec in signature.input_specs:
        if spec.kind is not InputKind.CONSTANT_TENSOR:
            groups.get(spec.kind, rest).append(spec)
            continue
        assert spec.target is not None
        value = program.constants[spec.target]
        original = _original(value, known)
        if original is None and not value.requires_grad:
            groups[spec.kind].append(spec)
            constants[spec.target] = value.detach().clone()
            continue
        if original is not None:
            node = by_name[spec.arg.name]
            first_use = first_uses.setdefault(original, node)
            if first_use is not node:  # torch.export has a constant for each use
                node.replace_all_uses_with(first_use)
                program.graph.erase_node(node)
                continue
        name = _free_name("tensor" if original is None else known[original], state)
        is_parameter = value.requires_grad or isinstance(original, nn.Parameter) or getattr(original, "requires_grad", False)
        kind = InputKind.PARAMETER if is_parameter else InputKind.BUFFER
        copy = value.detach().clone()
        state[name] = nn.Parameter(copy, requires_grad=copy.is_floating_point()) if is_parameter else copy
        persistent = None if is_parameter else True
        groups[kind].append(InputSpec(kind, spec.arg, name, persistent))
    specs = [spec for group in groups.values() for spec in group] + rest
    begin = next(node for node in program.graph.nodes if node.op != "placeholder")
    for spec in specs:
        begin.prepend(by_name[spec.arg.name])
    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=ExportGraphSignature(specs, signature.output_specs),
        state_dict=state,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=program.verifiers,
    )


def _original(value: Tensor, known: Iterable[Tensor]) -> Tensor | None:
    """The known tensor that a constant of a graph is a view of; None for a tensor that the program has made itself."""
    for tensor in known:
        if is_same_storage(value, tensor) and _geometry(value) == _geometry(tensor):
            return tensor
    return None


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _free_name(name: str, taken: Iterable[str]) -> str:
    """A name for the state dict that no other tensor has."""
    stem = re.sub(r"[^\w.]", "_", name).strip(".") or "tensor"
    found, number = stem, 1
    while any(other == found or other.startswith(f"{found}.") or found.startswith(f"{other}.") for other in taken):
        number += 1
        found = f"{stem}_{number}"
    return found


def random_operations(program: ExportedProgram) -> list[str]:
    """The names of the operations in a graph, and in the graphs inside of it, that draw random numbers."""
    is_random = torch.Tag.nondeterministic_seeded
    found = [node for node in _nodes(program) if is_random in getattr(node.target, "tags", ())]
    return [str(node.target) for node in found if draws(node.target, node.args, node.kwargs)]


def _nodes(program: ExportedProgram) -> Iterator[torch.fx.Node]:
    """The nodes of a graph, and of the graphs inside of it."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes


def unused_inputs(program: ExportedProgram, names: Sequence[str]) -> list[str]:
    """Those of the inputs on whose values no output depends.

    Args:
        program: the program.
        names: of all inputs, in their order.
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [nodes[name] for name in program.graph_signature.user_inputs if isinstance(name, str)]
    if len(inputs) != len(names):
        raise UnsupportedExportError("torch.export has changed the inputs of the program")
    return [name for name, node in zip(names, inputs, strict=True) if _is_unused(node)]


def _is_unused(node: Any) -> bool:
    for user in node.users:
        target = str(getattr(user.target, "overloadpacket", user.target)).rpartition(".")[2]
        if target not in _SHAPE_ONLY and not target.startswith("_assert"):
            return False
    return True
