"""A loader of ONNX files that takes nothing but what :meth:`~pyro_kd.export.exported.Exported.save` wrote, bit for bit.

The checksum at the end of the file is compared before anything reads it. What a forged file with the right checksum could do, reading
other files or running for ever, is refused by its operations.
"""

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_kd.errors import CorruptExportError, UnsupportedExportError, listing
from pyro_kd.export.description import Description, refuse_newer
from pyro_kd.export.numpy_noise import draw_noise
from pyro_kd.export.onnx_files import METADATA, naming_the_extra, seal_of, session_of
from pyro_kd.export.supports import check_values
from pyro_kd.utils.display import first_line

__all__ = ["OnnxProgram", "load_onnx"]

Array = NDArray[Any]

_FORBIDDEN = ("Random", "Multinomial", "Bernoulli", "Loop", "Scan", "If", "Optional", "Sequence")


class OnnxProgram:
    """A program that ONNX Runtime runs, loaded by :func:`load_onnx`.

    Attributes:
        session: of ONNX Runtime.
        description: the inputs and outputs, by name.
    """

    def __init__(self, session: Any, description: Description) -> None:
        self.session, self.description = session, description

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the program.

        Args:
            inputs: noise and arguments by name, of the shapes and data types of :attr:`description`.

        Returns:
            The outputs by name, of the shapes there.

        Raises:
            UnsupportedExportError: an input is missing, foreign or outside of its support, or ONNX Runtime refuses its shape or data
                type.
        """
        for item in self.description.inputs:
            if item.name in inputs and np.asarray(inputs[item.name]).dtype.kind in "biuf":  # else ONNX Runtime refuses it
                check_values(item, np.asarray(inputs[item.name]))
        rows = self._rows_in(inputs)
        if len(rows) > 1:
            raise UnsupportedExportError(f"the inputs have different numbers of rows: {sorted(rows)}")
        try:
            found = self.session.run(None, dict(inputs))
        except Exception as error:  # onnxruntime's errors have no common class
            raise UnsupportedExportError(
                f"the program takes {listing([item.name for item in (*self.description.noise, *self.description.inputs)])}, and "
                f"ONNX Runtime refuses what it was given: {first_line(error):.300}"
            ) from error
        return dict(zip([item.name for item in self.description.outputs], found, strict=True))

    def _rows_in(self, inputs: Mapping[str, Array]) -> set[int]:
        """The sizes of inputs that are the number of rows."""
        items = [item for item in (*self.description.noise, *self.description.inputs) if item.name in inputs]
        pairs = [pair for item in items for pair in zip(np.shape(inputs[item.name]), item.shape, strict=False)]
        return {size for size, name in pairs if isinstance(name, str)}

    def sample(
        self, rows: int | None = None, *, seed: int | np.random.Generator | None = None, **inputs: Array
    ) -> dict[str, Array]:
        """Draw noise with NumPy, and run the program on it.

        Args:
            rows: number of rows. None for that of the inputs; 1 where no input has it, or where it is fixed.
            seed: of the noise, or NumPy's random generator.
            **inputs: the arguments by name, of the shapes of :attr:`description`.

        Returns:
            The outputs by name, of the shapes there.
        """
        if rows is None:
            rows = max(self._rows_in(inputs), default=1)
        return self({**draw_noise(self.description, rows, np.random.default_rng(seed)), **inputs})


def load_onnx(path: str | Path, *, threads: int = 1) -> OnnxProgram:
    """Load a program that :meth:`~pyro_kd.export.exported.Exported.save` wrote as ``.onnx``.

    Args:
        path: of the file.
        threads: of ONNX Runtime.

    Raises:
        ModuleNotFoundError: onnx or onnxruntime is not installed.
        FileNotFoundError: there is no such file.
        CorruptExportError: the file is truncated, damaged or foreign, was written by a newer version, reads other files, draws
            random numbers, or has loops.
    """
    path = Path(path)
    with naming_the_extra():
        import onnx
        import onnxruntime
    content = _read(path)
    try:
        proto = onnx.load_from_string(content)
        written = {entry.key: entry.value for entry in proto.metadata_props}.get(METADATA, "")
        refuse_newer(written, "it")
        _check_graph(proto, onnx)
        description = Description.from_json(written)
        session = session_of(content, threads)
        names = [item.name for item in (*description.noise, *description.inputs)]
        if [item.name for item in session.get_inputs()] != names or len(session.get_outputs()) != len(description.outputs):
            raise CorruptExportError("its description does not fit its program")
    except CorruptExportError as error:
        raise CorruptExportError(f"{path}: {error}") from error
    except Exception as error:  # of protobuf and of onnxruntime
        raise CorruptExportError(
            f"{path} cannot be read by onnx {onnx.__version__} and onnxruntime {onnxruntime.__version__}: {type(error).__name__}: "
            f"{first_line(error):.200}. It was written for newer ones (pip install --upgrade onnx onnxruntime), or not by pyro_kd: "
            "then export the program again."
        ) from error
    return OnnxProgram(session, description)


def _read(path: Path) -> bytes:
    """The content of a file with the right checksum."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise CorruptExportError(f"{path} is not a file")
    content = path.read_bytes()
    seal = seal_of(b"")
    if len(content) < len(seal) or seal_of(content[: -len(seal)]) != content[-len(seal) :]:
        raise CorruptExportError(
            f"{path} is truncated or damaged, or was not written by pyro_kd: its checksum is missing or wrong. Export it again. "
            "onnxruntime.InferenceSession reads files that you trust."
        )
    return content


def _check_graph(proto: Any, onnx: Any) -> None:
    """Refuse operations and tensors that no export has."""
    known = {"", "ai.onnx", *(function.domain for function in proto.functions)}
    for graph in (proto.graph, *proto.functions):
        for node in graph.node:
            if node.op_type.startswith(_FORBIDDEN) or node.domain not in known:
                raise CorruptExportError(f"it holds the operation {node.op_type!r:.80}, which no export of pyro_kd has")
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise CorruptExportError(f"it reads the tensor {tensor.name!r:.80} from another file")


def _tensors(proto: Any) -> Iterator[Any]:
    yield from proto.graph.initializer
    for sparse in proto.graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for graph in (proto.graph, *proto.functions):
        for node in graph.node:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
