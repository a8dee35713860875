"""An exported program: a graph, what it takes and gives, and how it compares with the Pyro program."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from pyro_kd.errors import UnsupportedExportError, listing
from pyro_kd.export.description import Description, size_at
from pyro_kd.export.graph import device_of, moved, quietly
from pyro_kd.export.numpy_noise import draw_noise
from pyro_kd.export.onnx_files import save_onnx
from pyro_kd.export.pt2_files import save_pt2
from pyro_kd.export.report import ExportReport
from pyro_kd.export.supports import check_values
from pyro_kd.export.verification import Case

__all__ = ["Exported"]


class Exported:
    """A program as a function of tensors, made by :func:`~pyro_kd.export.export_sampler` or :func:`~pyro_kd.export.export_density`.

    Attributes:
        program: the program of ``torch.export``. Its ``state_dict`` holds parameters and buffers.
        description: its inputs and outputs, by name.
        report: how it compares with the Pyro program; None for one that was loaded from a file.
    """

    def __init__(
        self,
        program: ExportedProgram,
        description: Description,
        report: ExportReport | None,
        cases: Sequence[Case] = (),
        calls: ExportedProgram | None = None,
    ) -> None:
        self.program, self.description, self.report = program, description, report
        self._cases = tuple(cases)
        self._calls = calls  # the program with inverse distribution functions as single operations, and the same state dict

    @cached_property
    def module(self) -> torch.nn.Module:
        """The graph as a module, with the parameters of the state dict. It takes a dictionary of the inputs."""
        with quietly():
            return self.program.module()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the program.

        Args:
            inputs: noise and arguments by name, of the shapes and data types of :attr:`description`.

        Returns:
            The outputs by name, of the shapes there.

        Raises:
            UnsupportedExportError: an input is missing, foreign, has another shape or data type, or is outside of its support.
        """
        expected = (*self.description.noise, *self.description.inputs)
        names = {item.name for item in expected}
        if set(inputs) != names:
            raise UnsupportedExportError(
                f"the program takes {listing(names)}; missing are {listing(names - set(inputs))}, and foreign "
                f"{listing(set(inputs) - names)}"
            )
        rows: set[int] = set()
        for item in expected:
            tensor = inputs[item.name]
            if not isinstance(tensor, Tensor):
                raise UnsupportedExportError(
                    f"input {item.name!r} is a {type(tensor).__name__}, and should be a tensor: torch.as_tensor(...)"
                )
            sizes = [size for size, name in zip(tensor.shape, item.shape, strict=False) if isinstance(name, str)]
            rows |= set(sizes)
            fits = len(tensor.shape) == len(item.shape) and tuple(tensor.shape) == size_at(
                item.shape, sizes[0] if sizes else 0
            )
            if not fits or str(tensor.dtype) != f"torch.{item.dtype}":
                raise UnsupportedExportError(
                    f"input {item.name!r} has shape {tuple(tensor.shape)} and type {tensor.dtype}, and should have "
                    f"{item.shape} and torch.{item.dtype}"
                )
            check_values(item, tensor)
        if len(rows) > 1:
            raise UnsupportedExportError(f"the inputs have different numbers of rows: {sorted(rows)}")
        ordered = {item.name: inputs[item.name] for item in expected}
        if self.program.graph_signature.user_inputs_to_mutate:  # by a program that writes to its arguments
            ordered = {name: tensor.clone() for name, tensor in ordered.items()}
        with torch.no_grad():
            outputs: dict[str, Tensor] = self.module(ordered)
        return outputs

    def sample(
        self, rows: int | None = None, *, seed: int | np.random.Generator | None = None, **inputs: Tensor
    ) -> dict[str, Tensor]:
        """Draw noise with NumPy, and run the program on it.

        Args:
            rows: number of rows. None for that of the inputs, or where it is fixed.
            seed: of the noise, or NumPy's random generator.
            **inputs: the arguments by name, of the shapes of :attr:`description`.

        Returns:
            The outputs by name, of the shapes there.

        Raises:
            UnsupportedExportError: the number of rows cannot be known, or an input does not fit.
        """
        if self.description.kind == "density":
            raise UnsupportedExportError(
                "a density has no rows to draw: call it on values, density({...}), or export the program by export_sampler"
            )
        if rows is None:
            rows = self._rows_of(inputs)
        noise = draw_noise(self.description, rows, np.random.default_rng(seed))
        return self({**{name: torch.from_numpy(value).to(self.device) for name, value in noise.items()}, **inputs})

    @property
    def device(self) -> torch.device:
        """Where its parameters and constants are: inputs must be there, and outputs are."""
        return device_of(self.program)

    def to(self, device: torch.device | str) -> "Exported":
        """The same program on another device: of a student that was trained on a GPU, ``exported.to("cpu")`` runs everywhere."""
        return Exported(moved(self.program, device), self.description, self.report, self._cases)

    def _rows_of(self, inputs: Mapping[str, Tensor]) -> int:
        for item in self.description.inputs:
            for size, name in zip(inputs[item.name].shape if item.name in inputs else (), item.shape, strict=False):
                if isinstance(name, str):
                    return int(size)
        if self.description.has_rows:
            raise UnsupportedExportError("the number of rows is open: say how many, sample(rows)")
        return 1

    def save(self, path: str | Path, *, tolerance: float | None = None) -> Any:
        """Write the program to a file: ``.pt2`` for ``torch.export.load`` and :func:`~pyro_kd.export.load`, ``.onnx`` for ONNX
        Runtime and :func:`~pyro_kd.export.load_onnx`.

        An ONNX file is compared with the Pyro program by ONNX Runtime before it gets its name, if that is installed.

        Args:
            path: of the file.
            tolerance: for that comparison; see :func:`~pyro_kd.export.export_sampler`.

        Returns:
            None for ``.pt2``; for ``.onnx``, an :class:`~pyro_kd.export.onnx_files.OnnxReport`.

        Raises:
            UnsupportedExportError: the suffix is another one, ONNX lacks an operation of the graph, or the program was loaded.
            ExportMismatchError: the ONNX file gives other values.
            ModuleNotFoundError: onnx or onnxscript is not installed.
            CheckpointError: the file cannot be written.
        """
        suffix = Path(path).suffix
        if suffix == ".pt2":
            return save_pt2(self.program, self.description, path)
        if suffix == ".onnx":
            if not self._cases:
                raise UnsupportedExportError(
                    "a program that was loaded has no values of Pyro to compare an ONNX file with: save the ONNX file when the "
                    "program is exported, export_sampler(...).save('student.onnx')"
                )
            return save_onnx(self._calls or self.program, self.description, self._cases, path, tolerance)
        raise UnsupportedExportError(f"{path} has no suffix .pt2 or .onnx, which says what to write")

    def __repr__(self) -> str:
        return f"Exported({self.description.kind} of {self.description.program})"

    def __str__(self) -> str:
        return repr(self) if self.report is None else str(self.report)
