"""Inverse distribution functions in ONNX graphs: each is converted once, and its operations are put wherever a program calls it.

A program is converted with one operation for each call, since torch takes seconds to convert some hundred plain operations. Knows
graphs of torch.export and of ONNX.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pyro_kd.export.inlining import with_plain_operations
from pyro_kd.noise.single_operations import function_of

__all__ = ["Converter", "as_calls", "put_functions"]

Converter = Callable[[ExportedProgram, Sequence[str], Sequence[str]], Any]
"""``convert(program, inputs, outputs)`` returns an ONNX model with these names of inputs and outputs."""

_DOMAIN = "pyro_kd"


def as_calls(program: ExportedProgram) -> ExportedProgram:
    """The same program, whose inverse distribution functions are single operations in ONNX too."""
    functions = {node.target: function for node in program.graph.nodes if (function := function_of(node.target))}
    if not functions:
        return program
    with torch.no_grad():
        return program.run_decompositions({target: _call(found.__name__) for target, found in functions.items()})


def _call(name: str) -> Callable[..., Tensor]:
    def call(*args: Tensor) -> Tensor:
        shape = args[0].shape
        return torch.onnx.ops.symbolic(f"{_DOMAIN}::{name}", args, dtype=torch.float64, shape=shape, version=1)

    return call


def put_functions(model: Any, convert: Converter) -> None:
    """Put the operations of inverse distribution functions in place of their calls.

    Args:
        model: of ONNX, which is changed in place.
        convert: makes an ONNX model of a program.
    """
    calls = [node for node in model.graph.node if node.domain == _DOMAIN]
    if not calls:
        return
    nodes, constants = [], set()
    for node in model.graph.node:
        if node.domain != _DOMAIN:
            nodes.append(node)
            continue
        graph = _model_of(node.op_type, len(node.input), convert).graph
        names = dict(zip([item.name for item in graph.input], node.input, strict=True))
        names[graph.output[0].name] = node.output[0]
        for constant in graph.initializer:
            names[constant.name] = name = f"{node.op_type}/{constant.name}"
            if name not in constants:
                constants.add(name)
                model.graph.initializer.add().CopyFrom(constant)
                model.graph.initializer[-1].name = name
        for inner in graph.node:
            copy = type(inner)()
            copy.CopyFrom(inner)
            copy.name = f"{node.output[0]}/{inner.name}"
            for values in (copy.input, copy.output):
                values[:] = [names.get(name, f"{node.output[0]}/{name}" if name else "") for name in values]
            nodes.append(copy)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kept = [item for item in model.opset_import if item.domain != _DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)


@functools.cache
def _model_of(name: str, arguments: int, convert: Converter) -> Any:
    """The ONNX model of a function, made once."""
    operation = getattr(torch.ops.pyro_kd, name).default
    inputs = [f"x{i}" for i in range(arguments)]
    example = tuple(torch.full((3,), 0.5, dtype=torch.float64) for _ in inputs)
    rows = Dim("rows")
    with torch.no_grad():
        program = torch.export.export(_Module(operation), (example,), dynamic_shapes=(tuple({0: rows} for _ in inputs),))
        return convert(with_plain_operations(program.run_decompositions({})), inputs, ["y"])


class _Module(nn.Module):
    """The form that torch.export takes."""

    def __init__(self, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self._operation = operation

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        return self._operation(*inputs)
