"""Plain numbers of a float64 graph as tensors, before it becomes ONNX: ``torch.onnx`` rounds plain numbers to float32.

Knows graphs of torch.export; no programs and no ONNX.
"""

import copy
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Node

__all__ = ["with_exact_numbers"]

aten = torch.ops.aten

_TENSOR_FORMS: dict[Any, Any] = {
    **{getattr(aten, name).Scalar: getattr(aten, name).Tensor for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    **{getattr(aten, name).Tensor: getattr(aten, name).Tensor for name in ("add", "sub", "mul", "div")},
    **{getattr(aten, name).Scalar: getattr(aten, name).Tensor for name in ("masked_fill", "remainder", "lerp")},
    **{getattr(aten, name).default: getattr(aten, name).Tensor for name in ("clamp", "clamp_min", "clamp_max")},
    **{getattr(aten.where, name): aten.where.self for name in ("Scalar", "ScalarSelf", "ScalarOther")},
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
    aten.pow.Scalar: aten.pow.Tensor_Tensor,
    aten.rsub.Scalar: aten.sub.Tensor,
}
"""Operation that takes a number -> the one that takes a tensor in its place."""

_FILLS = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2}
"""Operation that fills a tensor -> the place of the number."""


def with_exact_numbers(program: ExportedProgram) -> ExportedProgram:
    """A program in which numbers that float32 rounds are tensors of float64, wherever the operation computes in float64.

    Covered are arithmetic, comparisons, ``where``, ``clamp``, ``pow``, ``masked_fill``, ``remainder``, ``lerp`` and ``full``. The
    program that is given stays as it is; it is returned if it has no such numbers.
    """
    if not any(_is_rounded(node, number) for node in program.graph.nodes for number in (*node.args, *node.kwargs.values())):
        return program
    module = copy.deepcopy(program.graph_module)
    specs = list(program.graph_signature.input_specs)
    first = next(i for i, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT)
    user_input = [node for node in module.graph.nodes if node.op == "placeholder"][first]
    constants: dict[str, Any] = dict(program.constants)
    made: dict[float, Node] = {}

    def tensor_of(number: float) -> Node:
        if number not in made:
            name = f"exact_number_{len(made)}"
            with module.graph.inserting_before(user_input):
                made[number] = node = module.graph.placeholder(name)
            constants[name] = torch.tensor(number, dtype=torch.float64)
            node.meta["val"] = user_input.meta["val"].fake_mode.from_tensor(constants[name])
            specs.insert(first + len(made) - 1, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name, None))
        return made[number]

    for node in list(module.graph.nodes):
        _lift(node, tensor_of)
    module.recompile()
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=ExportGraphSignature(specs, program.graph_signature.output_specs),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=program.verifiers,
    )


def _is_rounded(node: Node, number: Any) -> bool:
    """Whether a node computes in float64 with a number that float32 does not hold."""
    if type(number) is not float or node.op != "call_function" or node.target not in (*_TENSOR_FORMS, *_FILLS):
        return False
    tensors = [item.meta.get("val") for item in node.all_input_nodes] + [node.meta.get("val")]
    if not any(isinstance(value, Tensor) and value.dtype is torch.float64 for value in tensors):
        return False
    try:
        return number == number and struct.unpack("f", struct.pack("f", number))[0] != number
    except OverflowError:
        return True


def _lift(node: Node, tensor_of: Callable[[float], Node]) -> None:
    """Let an operation take tensors in place of numbers."""
    if not any(_is_rounded(node, number) for number in (*node.args, *node.kwargs.values())):
        return
    if node.target in _FILLS:
        place = _FILLS[node.target]
        number = node.args[place]
        assert isinstance(number, float)
        with node.graph.inserting_before(node):
            zeros = node.graph.call_function(
                node.target, (*node.args[:place], 0.0, *node.args[place + 1 :]), dict(node.kwargs)
            )
        zeros.meta.update(node.meta)
        node.target, node.args, node.kwargs = aten.add.Tensor, (zeros, tensor_of(number)), {}
        return
    if any(_is_rounded(node, number) for number in node.kwargs.values()):
        return  # a factor such as alpha, which has no form as a tensor
    is_number = [type(item) in (int, float) for item in node.args]
    args = tuple(tensor_of(float(item)) if number else item for item, number in zip(node.args, is_number, strict=True))  # type: ignore[arg-type]
    node.args = args[1::-1] if node.target is aten.rsub.Scalar else args
    node.target = _TENSOR_FORMS[node.target]
