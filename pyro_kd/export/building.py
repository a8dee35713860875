"""From a function of named tensors to an exported program that was compared with its original."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_kd.errors import UnsupportedExportError
from pyro_kd.export.description import Description, NoiseInput, Shape, Value, size_at
from pyro_kd.export.exported import Exported
from pyro_kd.export.graph import Function, complete, random_operations, trace_graph, unused_inputs
from pyro_kd.export.inlining import with_plain_operations
from pyro_kd.export.report import ExportReport
from pyro_kd.export.verification import Case, check_cases, rows_per_second

__all__ = ["build", "rows_in"]


def build(
    kind: str,
    name: str,
    function: Function,
    noise: Sequence[NoiseInput],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    known: Mapping[Tensor, str],
    cases: Sequence[Case],
    run_in_pyro: Callable[[], Any],
    tolerance: float | None,
    started: float,
) -> Exported:
    """Export a function, verify it, and measure it.

    Args:
        kind, name: of the program, for the description.
        function: the function of the inputs.
        noise, inputs, outputs: what it takes and gives. Inputs on whose values nothing depends are left out.
        known: parameters and buffers with their names.
        cases: inputs with the outputs to expect. The first one serves as the example.
        run_in_pyro: runs the Pyro program once, on as many rows as the first case has.
        tolerance: see :func:`~pyro_kd.export.verification.check_cases`.
        started: when the export started, in seconds of ``time.perf_counter``.

    Raises:
        UnsupportedExportError: a random operation is left in the graph.
        ExportMismatchError: it gives other values.
    """
    if not cases[0].inputs:
        raise UnsupportedExportError(
            f"{name} takes no noise and no arguments: its values are constants, and there is nothing to run. Save them as they are."
        )
    example = cases[0]
    shapes: dict[str, Shape] = {item.name: item.shape for item in (*noise, *inputs)}
    program = trace_graph(function, example.inputs, shapes)
    unused = unused_inputs(program, list(example.inputs))
    kept = {item: shape for item, shape in shapes.items() if item not in unused}
    if unused and _has_rows(kept) == _has_rows(shapes):
        fill = {item: (shapes[item], example.inputs[item]) for item in unused}
        program = trace_graph(_filled(function, fill, kept), _only(example.inputs, kept), kept)
        cases = [replace(case, inputs=_only(case.inputs, kept)) for case in cases]
        noise, inputs = [item for item in noise if item.name in kept], [item for item in inputs if item.name in kept]
    calls = complete(program, known)
    program = with_plain_operations(calls)
    found = random_operations(program)
    if found:
        raise UnsupportedExportError(
            f"the graph still draws random numbers ({', '.join(sorted(set(found)))}), which would not be a function of its inputs. "
            "Draw at sample sites."
        )
    description = Description(kind, name, tuple(noise), tuple(inputs), tuple(outputs))
    exported = Exported(program, description, None, cases, calls)
    largest = check_cases(cases, lambda case: exported(case.inputs), tolerance, f"the exported {kind} of {name}")
    seconds = time.perf_counter() - started
    state = list(program.state_dict.values())
    exported.report = ExportReport(
        description=description,
        parameters=sum(tensor.numel() for tensor in state),
        size=sum(tensor.numel() * tensor.element_size() for tensor in state),
        operations=sum(node.op == "call_function" for node in program.graph.nodes),
        largest_difference=largest,
        rows_per_second=rows_per_second(lambda: exported(cases[0].inputs), max(example.rows, 1)),
        pyro_rows_per_second=rows_per_second(run_in_pyro, max(example.rows, 1)),
        seconds=seconds,
    )
    return exported


def rows_in(inputs: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> Any:
    """The number of rows of the inputs, which is a symbol in a graph; 0 if none has rows."""
    for name, tensor in inputs.items():
        for size, symbol in zip(tensor.shape, shapes[name], strict=True):
            if isinstance(symbol, str):
                return size
    return 0


def _only(inputs: Mapping[str, Tensor], names: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name in names}


def _has_rows(shapes: Mapping[str, Shape]) -> bool:
    """Whether a size is the number of rows."""
    return any(isinstance(size, str) for shape in shapes.values() for size in shape)


def _filled(function: Function, fill: Mapping[str, tuple[Shape, Tensor]], shapes: Mapping[str, Shape]) -> Function:
    """The same function without the inputs on which nothing depends: they are zero."""

    def filled(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = rows_in(inputs, shapes)
        zeros = {
            name: torch.zeros(size_at(shape, rows), dtype=like.dtype, device=like.device)
            for name, (shape, like) in fill.items()
        }
        return function({**zeros, **inputs})

    return filled
