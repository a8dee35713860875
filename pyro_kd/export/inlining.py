"""The plain operations of inverse distribution functions, in place of the single operations that a program was traced with.

The graph of a function holds no shapes, so that one serves all sites. Knows graphs of torch.export; no programs and no noise.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_kd.noise.single_operations import function_of

__all__ = ["with_plain_operations"]

aten = torch.ops.aten


def with_plain_operations(program: ExportedProgram) -> ExportedProgram:
    """The same program, with the operations that inverse distribution functions consist of. What is given stays as it is."""
    if not any(function_of(node.target) for node in program.graph.nodes):
        return program
    module = copy.deepcopy(program.graph_module)
    graph, entries = module.graph, [_copied(entry) for entry in program.module_call_graph]
    calls = [(node, function) for node in graph.nodes if (function := function_of(node.target)) is not None]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    signature, constants = copy.deepcopy(program.graph_signature), dict(program.constants)
    specs = list(signature.input_specs)
    first = next(i for i, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT)
    made: dict[tuple[Any, str], Node] = {}
    known: dict[Any, list[Any]] = {}

    def constant_of(function: Any, name: str, value: Tensor) -> Node:
        if (function, name) not in made:
            target = f"{function.__name__}_{name.strip('_')}"
            with graph.inserting_before(placeholders[first]):
                made[function, name] = node = graph.placeholder(target)
            constants[target] = value
            node.meta["val"] = fake_mode.from_tensor(value, static_shapes=True)
            specs.insert(
                first + len(made) - 1, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), target, None)
            )
        return made[function, name]

    for call, function in calls:
        examples = [node.meta["val"] for node in call.args]
        fake_mode = examples[0].fake_mode
        key = (function, *(tuple(map(str, example.shape)) for example in examples))
        result = _copy(function, call, constant_of, known.setdefault(key, []))
        call.replace_all_uses_with(result)
        signature.replace_all_uses(call.name, result.name)
        for entry in entries:
            if entry.signature is not None:
                entry.signature.replace_all_uses_with(call, result)
        graph.erase_node(call)
    module.recompile()
    return ExportedProgram(
        root=module,
        graph=graph,
        graph_signature=ExportGraphSignature(specs, signature.output_specs),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=entries,
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=program.verifiers,
    )


def _copied(entry: ModuleCallEntry) -> ModuleCallEntry:
    """A copy whose names can change; the descriptions of nested arguments stay."""
    found = entry.signature
    if found is None:
        return entry
    inputs, outputs = ([copy.copy(item) for item in items] for items in (found.inputs, found.outputs))
    return replace(entry, signature=replace(found, inputs=inputs, outputs=outputs))


def _copy(function: Callable[..., Tensor], call: Node, constant_of: Callable[..., Node], values: list[Any]) -> Any:
    """Copy the graph of a function before the node that calls it.

    Args:
        function: the function.
        call: the node.
        constant_of: makes the node of a constant.
        values: examples of the values of all nodes, for these shapes; filled if empty.

    Returns:
        The node with the result.
    """
    given: list[Any] = list(call.args)
    example = given[0].meta["val"]
    module = _graph_of(function, len(given), example.device)
    copies: dict[Node, Any] = {}
    is_new = not values
    found = iter(list(values))
    inputs = iter(given)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(inputs)
        elif node.op == "get_attr":
            copies[node] = constant_of(function, str(node.target), getattr(module, str(node.target)))
        elif node.target is aten.lift_fresh_copy.default:
            copies[node] = copies[node.args[0]]
        elif node.op == "output":
            return copies[node.args[0]]
        else:
            with call.graph.inserting_before(call):
                copied = call.graph.node_copy(node, copies.__getitem__)
            if is_new:
                values.append(_value(copied, example.fake_mode))
            copied.meta = {"val": values[-1] if is_new else next(found)}
            copies[node] = copied
    raise AssertionError("a graph has an output")


def _value(node: Node, fake_mode: Any) -> Any:
    """What a node gives for the examples of its arguments."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda item: item.meta["val"])
    with fake_mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


@functools.cache
def _graph_of(function: Callable[..., Tensor], arguments: int, device: torch.device) -> GraphModule:
    """The graph of a function, traced once."""
    example = torch.full((3,), 0.5, dtype=torch.float64, device=device)
    with torch.no_grad():
        return make_fx(function)(*[example.clone() for _ in range(arguments)])
