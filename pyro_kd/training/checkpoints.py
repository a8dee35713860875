"""Checkpoints: a folder of folders, each written under a temporary name and renamed when it is complete.

    FOLDER/step-00001000/student.safetensors   parameters and buffers
                         state.safetensors     history, random states, best student
                         optimiser.pt          read with weights_only=True
                         checkpoint.json       everything else, size and checksum of the other files, and its own checksum

A killed process leaves at most a temporary folder behind, never half a checkpoint. Nothing is unpickled in a way that runs code.
Reading a folder changes nothing in it, and a run deletes only what it has written itself. This module knows files and tensors, and
nothing about training.
"""

import itertools
import json
import os
import platform
import re
import secrets
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyro
import torch
from torch import Tensor

from pyro_kd.errors import CheckpointError
from pyro_kd.training.checkpoint_values import check_values
from pyro_kd.training.files import require_regular, share_as_usual
from pyro_kd.training.lock import locked
from pyro_kd.training.optimiser_files import read_optimiser

__all__ = ["Checkpoint", "CheckpointFolder"]

FORMAT = "pyro_kd checkpoint"
FORMAT_VERSION = 1
_FILES = ("student.safetensors", "state.safetensors", "optimiser.pt")
_HEADER = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})(?:-(\d{1,6}))?")
_ASIDE = ".pyro_kd-writing-"
_MOST_BYTES = 1 << 28
"""How large a checkpoint.json may be."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: number of optimisation steps done.
        student: parameters and buffers by name.
        tensors: all further tensors by name.
        optimiser: state of optimiser and scheduler.
        values: everything that JSON can hold.
        run: identifier of the training run, which a resumed run keeps.
        path: where it was read from, or None.
    """

    step: int
    student: dict[str, Tensor]
    tensors: dict[str, Tensor]
    optimiser: dict[str, Any]
    values: dict[str, Any]
    run: str
    path: Path | None = None


class CheckpointFolder:
    """The checkpoints in a folder: finds the newest good one, and writes more.

    Args:
        path: the folder, which need not exist before :meth:`claimed`.
        keep: how many checkpoints of a run to keep.
    """

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.path = Path(path)
        self.keep = keep

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder if it does not exist, and keep other runs from writing into it inside the context.

        Raises:
            CheckpointError: the folder cannot be written.
            FolderInUseError: a different run writes into it.
            ModuleNotFoundError: safetensors is not installed.
        """
        _safetensors()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".pyro_kd-probe-{os.getpid()}-{secrets.token_hex(4)}"
            with probe.open("xb") as file:  # a link of this name would lead elsewhere
                file.write(b"pyro_kd")
            probe.unlink()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(
                f"the checkpoint folder {self.path} cannot be written ({reason}). Nothing was trained. Pass "
                "a writable folder: fit(..., checkpoints='runs/student')."
            ) from error
        with locked(self.path) as is_alone:
            if is_alone:
                for left in self.path.glob(f"{_ASIDE}*"):  # left by a run that was killed
                    shutil.rmtree(left, ignore_errors=True)
            yield

    def write(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint atomically. Then delete the run's oldest checkpoints beyond ``keep``, and its own of later steps.

        If something that the run has not written has the checkpoint's name, the checkpoint is called ``step-00001000-2``.

        Raises:
            CheckpointError: the checkpoint cannot be written; the folder is as it was.
        """
        target, written, replaced = self._place_of(checkpoint), self._aside(), self._aside()
        try:
            written.mkdir()
            _write_files(checkpoint, written)
            if target.exists():
                written = written.rename(self._free_place(checkpoint.step))  # which is found if the process is killed here
                target.rename(replaced)
            written.rename(target)
        except BaseException as error:  # on a full disk, safetensors and torch raise errors of their own
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            shutil.rmtree(written, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            raise CheckpointError(
                f"the checkpoint of step {checkpoint.step} could not be written to {self.path} ({error})"
            ) from error
        shutil.rmtree(replaced, ignore_errors=True)
        own = [path for path in self.all() if _run_of(path) == checkpoint.run]
        last = own.index(target)
        for old in (*own[: max(last + 1 - self.keep, 0)], *own[last + 1 :]):
            shutil.rmtree(old, ignore_errors=True)
        return target

    def all(self) -> list[Path]:
        """The folders whose names are those of checkpoints, oldest first, whatever is in them."""
        paths = self.path.iterdir() if self.path.is_dir() else ()
        found = [(place, path) for path in paths if (place := _place_in_order(path)) is not None and path.is_dir()]
        return [path for _, path in sorted(found)]

    def newest(self) -> Checkpoint | None:
        """The newest good checkpoint, with a warning about damaged newer ones; None where there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, and none is good.
        """
        first_error = None
        for path in reversed(self.all()):
            try:
                return self.read(path)
            except CheckpointError as error:
                first_error = first_error or error
                warnings.warn(
                    f"{error} It stays as it is, and the checkpoint before it is used, if there is one.", stacklevel=2
                )
        if first_error is not None:
            raise first_error
        return None

    @staticmethod
    def read(path: str | Path) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            CheckpointError: the checkpoint is truncated or damaged, was not written by pyro_kd, or has a newer format.
        """
        path = Path(path)
        header = _read_header(path)
        try:
            return _read_files(path, header)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged: its checkpoint.json lacks an entry, or has a wrong one ({type(error).__name__}: {error})."
            ) from error

    def _aside(self) -> Path:
        return self.path / f"{_ASIDE}{os.getpid()}-{secrets.token_hex(4)}"

    def _place_of(self, checkpoint: Checkpoint) -> Path:
        """A path for a checkpoint: one that does not exist, or one that this run has written."""
        places = self._places(checkpoint.step)
        return next(path for path in places if not os.path.lexists(path) or _run_of(path) == checkpoint.run)

    def _free_place(self, step: int) -> Path:
        """A path for a checkpoint that does not exist."""
        return next(path for path in self._places(step) if not os.path.lexists(path))

    def _places(self, step: int) -> Iterator[Path]:
        return (self.path / f"step-{step:08d}{f'-{number}' * (number > 1)}" for number in itertools.count(1))


def _place_in_order(path: Path) -> tuple[int, int] | None:
    """The step in the name of a checkpoint's folder, and its number among those of this step; None for any other name."""
    match = _NAME.fullmatch(path.name)
    if match is None or (len(match[1]) > 8 and match[1][0] == "0"):
        return None
    return int(match[1]), int(match[2] or 1)


def _write_files(checkpoint: Checkpoint, folder: Path) -> None:
    save = _safetensors().save_file
    save(checkpoint.student, folder / "student.safetensors")
    save(checkpoint.tensors, folder / "state.safetensors")
    torch.save(_plain(checkpoint.optimiser), folder / "optimiser.pt")
    header: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "run": checkpoint.run,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "numpy": numpy.__version__,
        },
        "files": {name: {"bytes": (folder / name).stat().st_size, "crc32": _crc32(folder / name)} for name in _FILES},
        "values": checkpoint.values,
    }
    header["crc32"] = _checksum(header)
    (folder / _HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
    share_as_usual(folder)


def _read_header(path: Path) -> dict[str, Any]:
    """What checkpoint.json holds.

    Raises:
        CheckpointError: the file is damaged, was not written by pyro_kd, or has a newer format.
    """
    try:
        require_regular(path / _HEADER, most_bytes=_MOST_BYTES, links=True)
        header = json.loads((path / _HEADER).read_text(encoding="utf-8"))
        checksum = _checksum(header) if isinstance(header, dict) else None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no checkpoint of pyro_kd: its {_HEADER} cannot be read ({error}).") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of pyro_kd: its {_HEADER} does not say format {FORMAT!r}.")
    version = header.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by a newer pyro_kd: format version {version}, and this version reads {FORMAT_VERSION}. "
            "Upgrade pyro_kd: pip install --upgrade pyro-kd."
        )
    if type(version) is not int or version != FORMAT_VERSION or header.get("crc32") != checksum:
        raise CheckpointError(f"{path} is damaged: its {_HEADER} is not as it was written.")
    place = _place_in_order(path)
    if place is not None and place[0] != header.get("step"):
        raise CheckpointError(f"{path} is damaged: it holds step {header.get('step')}.")
    return header


def _read_files(path: Path, header: dict[str, Any]) -> Checkpoint:
    for name in _FILES:
        expected, file = header["files"][name], path / name
        try:
            require_regular(file, links=True)
            is_whole = file.stat().st_size == expected["bytes"] and _crc32(file) == expected["crc32"]
        except OSError as error:
            raise CheckpointError(f"{path} is truncated or damaged: {name} cannot be read ({error}).") from error
        if not is_whole:
            raise CheckpointError(f"{path} is truncated or damaged: {name} is not as it was written.")
    load = _safetensors().load_file
    try:
        student, tensors = load(path / "student.safetensors"), load(path / "state.safetensors")
    except Exception as error:  # safetensors raises errors of its own types
        raise CheckpointError(f"{path} is damaged: its tensors cannot be read ({error}).") from error
    try:
        optimiser = read_optimiser(path / "optimiser.pt")
    except Exception as error:  # torch.load raises many types of errors
        raise CheckpointError(
            f"{path} is not trusted: optimiser.pt holds more than tensors and plain values ({error})."
        ) from error
    step, values = header["step"], header["values"]
    check_values(step, values, tensors, path)
    if not isinstance(header["run"], str):
        raise TypeError("the run's name must be a text")
    return Checkpoint(step, student, tensors, optimiser, values, header["run"], path)


def _run_of(path: Path) -> str | None:
    """The identifier of the run that wrote a checkpoint; None for anything else, also for a damaged checkpoint."""
    try:
        return None if path.is_symlink() else _read_header(path).get("run")
    except CheckpointError:
        return None


def _checksum(header: dict[str, Any]) -> int:
    """The checksum of all other entries of a header."""
    rest = {name: value for name, value in header.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _plain(value: Any) -> Any:
    """A value with NumPy's numbers as Python's, which ``weights_only=True`` can read."""
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
