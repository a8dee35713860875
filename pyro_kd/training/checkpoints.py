"""Checkpoints: a folder of folders, each written aside and renamed when it is complete.

    FOLDER/step-00001000/student.safetensors   parameters and buffers
                         state.safetensors     history, random states, best student so far
                         optimiser.pt          read with weights_only=True
                         checkpoint.json       everything else, and the size and checksum of the other files

A killed process leaves at most a temporary folder behind, never half a checkpoint. Nothing is unpickled with code execution.
"""

import json
import os
import platform
import re
import shutil
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy
import pyro
import torch
from torch import Tensor

from pyro_kd.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointFolder"]

FORMAT = "pyro_kd checkpoint"
FORMAT_VERSION = 1
_FILES = ("student.safetensors", "state.safetensors", "optimiser.pt")
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: number of optimisation steps done.
        student: parameters and buffers by name.
        tensors: other tensors by name.
        optimiser: state of optimiser and scheduler.
        values: what JSON can hold.
        path: where it was read from, or written to.
    """

    step: int
    student: dict[str, Tensor]
    tensors: dict[str, Tensor]
    optimiser: dict[str, Any]
    values: dict[str, Any]
    path: Path | None = None


class CheckpointFolder:
    """Writes checkpoints into a folder, and finds the newest good one.

    Args:
        path: the folder; made where it does not exist.
        keep: how many to keep.

    Raises:
        CheckpointError: the folder cannot be written.
        ModuleNotFoundError: safetensors is not installed.
    """

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        _safetensors()
        self.path = Path(path)
        self.keep = keep
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_bytes(b"pyro_kd")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint folder {self.path} cannot be written ({error.strerror}). Nothing was trained. Pass "
                "a folder that can: fit(..., checkpoint='runs/student')."
            ) from error
        for left in self.path.glob(".tmp-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)

    def write(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, atomically; delete the oldest beyond ``keep``, and damaged ones of later steps."""
        target = self.path / f"step-{checkpoint.step:08d}"
        aside = self.path / f".tmp-{checkpoint.step:08d}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            save = _safetensors().save_file
            save(checkpoint.student, aside / "student.safetensors")
            save(checkpoint.tensors, aside / "state.safetensors")
            torch.save(_plain(checkpoint.optimiser), aside / "optimiser.pt")
            header = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "step": checkpoint.step,
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "pyro": pyro.__version__,
                    "numpy": numpy.__version__,
                },
                "files": {
                    file.name: {"bytes": file.stat().st_size, "crc32": _crc32(file)} for file in sorted(aside.iterdir())
                },
                "values": checkpoint.values,
            }
            (aside / "checkpoint.json").write_text(json.dumps(header, indent=1), encoding="utf-8")
            if target.exists():
                shutil.rmtree(target)
            aside.rename(target)
        except Exception as error:  # a full disk raises an error of safetensors or torch's own
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {checkpoint.step} could not be written to {self.path} ({error})"
            ) from error
        there = self.all()
        last = there.index(target)
        for old in (*there[: max(last + 1 - self.keep, 0)], *there[last + 1 :]):
            shutil.rmtree(old, ignore_errors=True)
        return target

    def all(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        found = {int(match[1]): path for path in self.path.iterdir() if (match := _NAME.fullmatch(path.name))}
        return [found[step] for step in sorted(found)]

    def newest(self) -> Checkpoint | None:
        """The newest good checkpoint, with a warning about newer ones that are not good; None where there are none at all.

        Raises:
            CheckpointError: there are some, and none is good.
        """
        first_error = None
        for path in reversed(self.all()):
            try:
                return self.read(path)
            except CheckpointError as error:
                first_error = first_error or error
                warnings.warn(f"{error} The one before it is used, if there is one.", stacklevel=2)
        if first_error is not None:
            raise first_error
        return None

    @staticmethod
    def read(path: str | Path) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            CheckpointError: it is truncated, or damaged, or none of pyro_kd's, or of a newer format.
        """
        path = Path(path)
        try:
            header = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is no checkpoint of pyro_kd: its checkpoint.json cannot be read ({error})."
            ) from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no checkpoint of pyro_kd: its checkpoint.json does not say format {FORMAT!r}.")
        try:
            return CheckpointFolder._read(path, header)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged: its checkpoint.json lacks an entry ({type(error).__name__}: {error})."
            ) from error

    @staticmethod
    def _read(path: Path, header: Any) -> Checkpoint:
        if header["format_version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} was written by a newer pyro_kd: format version {header['format_version']}, and this one reads "
                f"{FORMAT_VERSION}. Update pyro_kd."
            )
        for name in _FILES:
            expected, file = header["files"][name], path / name
            if not file.exists() or file.stat().st_size != expected["bytes"] or _crc32(file) != expected["crc32"]:
                raise CheckpointError(f"{path} is truncated or damaged: {name} is not as it was written.")
        load = _safetensors().load_file
        try:
            optimiser = torch.load(path / "optimiser.pt", map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise CheckpointError(
                f"{path} is not trusted: optimiser.pt holds more than tensors and plain values ({error})."
            ) from error
        return Checkpoint(
            step=header["step"],
            student=load(path / "student.safetensors"),
            tensors=load(path / "state.safetensors"),
            optimiser=optimiser,
            values=header["values"],
            path=path,
        )


def _plain(value: Any) -> Any:
    """With NumPy's numbers as Python's, which are read again with ``weights_only=True``."""
    if isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _crc32(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _safetensors() -> Any:
    try:
        from safetensors import torch as safetensors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "checkpoints are written with safetensors: pip install safetensors, or pyro-kd[training]"
        ) from error
    return safetensors
