"""ONNX files: an exported program with its description in the metadata, compared by ONNX Runtime before the file is there."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram, default_decompositions

from pyro_kd.errors import UnsupportedExportError
from pyro_kd.export.description import Description
from pyro_kd.export.exact_numbers import with_exact_numbers
from pyro_kd.export.graph import device_of, moved, quietly
from pyro_kd.export.onnx_functions import as_calls, put_functions
from pyro_kd.export.stable_operations import STABLE
from pyro_kd.export.verification import Case, check_cases, rows_per_second
from pyro_kd.training.files import replace_file
from pyro_kd.utils.display import first_line

__all__ = ["METADATA", "OnnxReport", "naming_the_extra", "save_onnx", "seal_of", "session_of"]

METADATA = "pyro_kd"
"""The key of the description in the metadata of an ONNX file."""

_CHECKSUM = b"pyro_kd_sha256"


@dataclass(frozen=True)
class OnnxReport:
    """What an ONNX file is like.

    Attributes:
        path: of the file.
        size: in bytes.
        opset: version of ONNX's operations.
        operations: their number.
        largest_difference: of an output of ONNX Runtime from that of the Pyro program; None if ONNX Runtime is not installed.
        rows_per_second: of ONNX Runtime on one thread; None likewise.
        start_seconds: that ONNX Runtime takes to load the file and make the first rows; None likewise.
    """

    path: Path
    size: int
    opset: int
    operations: int
    largest_difference: float | None
    rows_per_second: float | None
    start_seconds: float | None

    def __str__(self) -> str:
        text = f"{self.path}: {self.size:,} bytes, {self.operations:,} operations of opset {self.opset}"
        if self.largest_difference is None:
            return f"{text}; not compared, since onnxruntime is not installed: pip install 'pyro-kd[export]'"
        return (
            f"{text}\nlargest difference of ONNX Runtime from Pyro on the same noise: {self.largest_difference:.2g}\n"
            f"rows a second: {self.rows_per_second:,.0f}; started in {self.start_seconds:.2f} s"
        )


def save_onnx(
    program: ExportedProgram,
    description: Description,
    cases: Sequence[Case],
    path: str | Path,
    tolerance: float | None = None,
) -> OnnxReport:
    """Write an ONNX file.

    Args:
        program: the program, with inverse distribution functions as single operations or as plain ones.
        description: of it, kept under :data:`METADATA` as JSON.
        cases: inputs with the outputs of the Pyro program, for the comparison.
        path: of the file.
        tolerance: see :func:`~pyro_kd.export.verification.check_cases`.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
        UnsupportedExportError: ONNX has no operation that the graph needs.
        ExportMismatchError: ONNX Runtime gives other values.
        CheckpointError: the file cannot be written.
    """
    with naming_the_extra():
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    inputs = [item.name for item in (*description.noise, *description.inputs)]
    outputs = [item.name for item in description.outputs]
    try:
        with quietly():
            # Torch's converter makes constants on the CPU, and mixes them with those of a GPU.
            if device_of(program).type != "cpu":
                program = moved(program, "cpu")
            proto = _convert(as_calls(_decomposed(program)), inputs, _apart(outputs, inputs))
            put_functions(proto, _convert)
    except Exception as error:
        raise UnsupportedExportError(
            f"ONNX cannot express the {description.kind} of {description.program}: {_cause(error)}. Save it as .pt2."
        ) from error
    _name_rows(proto)
    _forget_sources(proto)
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA, description.to_json()
    content = proto.SerializeToString()
    content += seal_of(content)
    found = _compare(content, description, cases, tolerance)
    replace_file(path, lambda aside: aside.write_bytes(content), f"the {description.kind}")
    opset = max(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx"))
    return OnnxReport(Path(path), len(content), opset, len(proto.graph.node), *found)


def _convert(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """An ONNX model of a program."""
    made = torch.onnx.export(
        with_exact_numbers(program),
        dynamo=True,
        input_names=inputs,
        output_names=outputs,
        external_data=False,
        verbose=False,
    )
    assert made is not None
    return made.model_proto


@contextmanager
def naming_the_extra() -> Iterator[None]:
    """Import packages that ONNX files need: where one is missing, the error has the line that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"ONNX files need {error.name}, which is not installed: pip install 'pyro-kd[export]'. A .pt2 file needs nothing more.",
            name=error.name,
        ) from error


def session_of(content: bytes, threads: int = 1) -> Any:
    """A session of ONNX Runtime for the content of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def seal_of(content: bytes) -> bytes:
    """The last bytes of a file: one more entry of the metadata in protobuf, with the checksum of what comes before it."""
    value = hashlib.sha256(content).hexdigest().encode()
    entry = b"\x0a" + bytes([len(_CHECKSUM)]) + _CHECKSUM + b"\x12" + bytes([len(value)]) + value
    return b"\x72" + bytes([len(entry)]) + entry  # field 14 of a ModelProto


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """The same program without operations that ONNX expresses less well: einsum, and logarithms of sums of exponentials."""
    einsum = torch.ops.aten.einsum.default
    table = {einsum: default_decompositions()[einsum], **STABLE}
    if all(node.target not in table for node in program.graph.nodes):
        return program
    return program.run_decompositions(table)


def _forget_sources(proto: Any) -> None:
    """Leave out which lines of which files the operations are from."""
    functions = list(proto.functions)
    for item in (proto, proto.graph, *functions):
        item.doc_string = ""
        del item.metadata_props[:]
    for graph in (proto.graph, *functions):
        for node in (*graph.node, *graph.value_info):
            node.doc_string = ""
            del node.metadata_props[:]


def _apart(outputs: Sequence[str], inputs: Sequence[str]) -> list[str]:
    """The names of the outputs, which in ONNX must not be those of inputs."""
    return [f"{name}_out" if name in inputs else name for name in outputs]


def _cause(error: BaseException) -> str:
    """The first error of a chain, which names the operation."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = first_line(error) if isinstance(error, Exception) else str(error)
    return f"{type(error).__name__}: {text:.300}"


def _name_rows(proto: Any) -> None:
    """Call the open size ``rows``."""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param.isidentifier() and dim.dim_param.startswith("s"):
                dim.dim_param = "rows"


def _compare(
    content: bytes, description: Description, cases: Sequence[Case], tolerance: float | None
) -> tuple[float | None, float | None, float | None]:
    """The largest difference, the rows a second, and the seconds to start."""
    try:
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError:
        return None, None, None
    names = [item.name for item in description.outputs]

    def feed(case: Case) -> dict[str, Any]:
        return {name: _array(tensor) for name, tensor in case.inputs.items()}

    started = time.perf_counter()
    try:
        session = session_of(content)
        first = feed(cases[0])
        session.run(None, first)
    except Exception as error:  # onnxruntime's errors have no common class
        raise UnsupportedExportError(
            f"ONNX Runtime cannot run the {description.kind} of {description.program}: {type(error).__name__}: "
            f"{first_line(error):.300}. Save it as .pt2."
        ) from error
    start = time.perf_counter() - started

    def run(case: Case) -> Mapping[str, Any]:
        return dict(zip(names, map(_tensor, session.run(None, feed(case))), strict=True))

    difference = check_cases(cases, run, tolerance, f"the ONNX file of {description.program}")
    speed = rows_per_second(lambda: session.run(None, first), max(cases[0].rows, 1))
    return difference, speed, start


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().numpy()


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))  # which keeps the shape of an array without dimensions
