"""The files of a cache of teacher draws. Knows tensors, structures and paths, and no programs.

    FOLDER/draws-00000.safetensors   tensors of some draws, by the number of the draw and their own
           cache.json                which draw is where, everything that is no tensor, checksums, and its own checksum

A cache is written into a folder with a temporary name, which is renamed when it is complete. Nothing is unpickled. What is read must
be regular files with the names above, in the folder itself.
"""

import json
import os
import platform
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_kd.errors import TeacherCacheError
from pyro_kd.losses.packing import Structure
from pyro_kd.losses.teacher_draws import TeacherDraw
from pyro_kd.training.files import require_regular, share_as_usual
from pyro_kd.training.structures import decoded, encoded

__all__ = ["CacheWriter", "Header", "read_draw", "read_header", "writing"]

FORMAT = "pyro_kd cache of a teacher"
FORMAT_VERSION = 1
_HEADER = "cache.json"
_SHARD = re.compile(r"draws-\d{5,9}\.safetensors")
_SHARD_BYTES = 1 << 25
_SHARD_DRAWS = 256
_MOST_BYTES = 1 << 30


class _Kind(NamedTuple):
    """What draws have in common: their structure, and the shapes of tensors that are written without repetitions."""

    structure: Structure
    num_tensors: int
    shapes: dict[int, torch.Size]


class Header(NamedTuple):
    """What cache.json says.

    Attributes:
        path: the folder.
        teacher: the fingerprint of the teacher.
        about: targets, seed and versions, for people.
        files: size of each file by name.
        kinds: what draws have in common.
        draws: for each draw: the name of its file, the number of its kind, and the checksum of its tensors.
    """

    path: Path
    teacher: dict[str, str]
    about: dict[str, str]
    files: dict[str, int]
    kinds: list[_Kind]
    draws: list[tuple[str, int, int]]


def _versions() -> dict[str, str]:
    """The versions that decide what the attributes of a distribution mean."""
    return {"torch": torch.__version__.split("+")[0], "pyro": pyro.__version__}


class CacheWriter:
    """Writes draws into a folder, a few at a time.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, int] = {}
        self._kinds: dict[str, int] = {}
        self._draws: list[list[Any]] = []
        self._waiting: dict[str, Tensor] = {}
        self._num_waiting = self._bytes = 0

    def add(self, draw: TeacherDraw) -> None:
        """Write a draw, or keep it until there is enough for a file.

        Raises:
            UnknownPartError: a part of it cannot be written.
        """
        tensors, shapes = _without_repetitions(draw.tensors)
        kind = json.dumps([encoded(draw.structure), len(tensors), {str(k): list(shape) for k, shape in shapes.items()}])
        number = self._kinds.setdefault(kind, len(self._kinds))
        index = len(self._draws)
        self._waiting |= {f"{index}.{k}": tensor for k, tensor in enumerate(tensors)}
        self._draws.append([f"draws-{len(self._files):05d}.safetensors", number, _crc32(tensors)])
        self._num_waiting += 1
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self._bytes >= _SHARD_BYTES or self._num_waiting >= _SHARD_DRAWS:
            self._flush()

    def finish(self, teacher: dict[str, str], about: dict[str, str]) -> None:
        """Write what is waiting, and the header."""
        if self._num_waiting:
            self._flush()
        header: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "versions": _versions(),
            "about": about | {"python": platform.python_version()},
            "teacher": teacher,
            "files": self._files,
            "kinds": [json.loads(kind) for kind in self._kinds],
            "draws": self._draws,
        }
        header["crc32"] = _checksum(header)
        (self.folder / _HEADER).write_text(json.dumps(header), encoding="utf-8")
        share_as_usual(self.folder)
        for file in self.folder.iterdir():
            with file.open("rb+") as stream:  # the rename may reach the disk before what is in the file
                os.fsync(stream.fileno())

    def _flush(self) -> None:
        name = f"draws-{len(self._files):05d}.safetensors"
        _safetensors().save_file(self._waiting, self.folder / name)
        self._files[name] = (self.folder / name).stat().st_size
        self._waiting, self._num_waiting, self._bytes = {}, 0, 0


@contextmanager
def writing(path: Path) -> Iterator[CacheWriter]:
    """Write a cache: it is there at the end of the context, and nothing is after an error.

    Raises:
        TeacherCacheError: the folder exists and is not empty, or cannot be written.
        ModuleNotFoundError: safetensors is not installed.
    """
    _safetensors()
    if os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        raise TeacherCacheError(f"{path} exists, and nothing is written over it. Name a new folder, or delete this one.")
    aside = path.parent / f".pyro_kd-caching-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()  # under a name of its own: a fit removes what a killed one was writing, and both may be in one folder
        yield CacheWriter(aside)
        if path.is_dir():
            path.rmdir()
        aside.rename(path)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__module__.startswith("safetensors"):  # as on a full disk
            raise TeacherCacheError(
                f"the cache could not be written to {path} ({error}). Nothing was left there."
            ) from error
        raise


def read_header(path: Path) -> Header:
    """Read cache.json.

    Raises:
        TeacherCacheError: it is damaged, was not written by pyro_kd, or belongs to a different version.
    """
    file = path / _HEADER
    try:
        require_regular(file, most_bytes=_MOST_BYTES)
        header = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TeacherCacheError(f"{path} is no cache of a teacher: its {_HEADER} cannot be read ({error}).") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TeacherCacheError(f"{path} is no cache of a teacher: its {_HEADER} does not say format {FORMAT!r}.")
    version = header.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise TeacherCacheError(
            f"{path} was written by a newer pyro_kd: format version {version}, and this version reads {FORMAT_VERSION}. Upgrade "
            "pyro_kd: pip install --upgrade pyro-kd. Or write the cache again with this version: cache_teacher(...)."
        )
    if type(version) is not int or version != FORMAT_VERSION:
        raise TeacherCacheError(
            f"{path} was written by a different version of pyro_kd: format version {version!r:.20}, and this "
            f"one reads {FORMAT_VERSION}. Write it again: cache_teacher(...)."
        )
    if header.get("crc32") != _checksum(header):
        raise TeacherCacheError(f"{path} is damaged: its {_HEADER} is not as it was written.")
    if header.get("versions") != _versions():
        raise TeacherCacheError(
            f"{path} was written with {header.get('versions')!r:.80}, and these are {_versions()}: parameters of distributions may "
            "have other meanings. Write it again: cache_teacher(...)."
        )
    try:
        return _checked_header(path, header)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TeacherCacheError(
            f"{path} is damaged: its {_HEADER} lacks an entry, or has a wrong one ({type(error).__name__}: {error})."
        ) from error


def read_draw(header: Header, index: int) -> TeacherDraw:
    """Read a draw, whose contents are not checked yet.

    Raises:
        TeacherCacheError: it is damaged.
    """
    name, number, checksum = header.draws[index]
    file, kind = header.path / name, header.kinds[number]
    try:
        require_regular(file)
        if file.stat().st_size != header.files[name]:
            raise ValueError("it has a different size")
        with _safetensors().safe_open(file, framework="pt") as stream:
            tensors = [stream.get_tensor(f"{index}.{k}").clone() for k in range(kind.num_tensors)]
        if _crc32(tensors) != checksum:
            raise ValueError("its checksum is a different one")
        return TeacherDraw(kind.structure, _with_repetitions(tensors, kind.shapes))
    except Exception as error:  # safetensors raises errors of its own types
        raise TeacherCacheError(f"{header.path} is truncated or damaged: draw {index} in {name} ({error}).") from error


def _checked_header(path: Path, header: dict[str, Any]) -> Header:
    files, texts = header["files"], (header["teacher"], header["about"])
    if not all(_SHARD.fullmatch(name) and type(size) is int for name, size in files.items()):
        raise ValueError("files")
    if not all(type(text) is str for part in texts for text in part.values()):
        raise ValueError("about the teacher")
    kinds = [
        _Kind(decoded(structure, count), count, {int(k): _size(shape) for k, shape in shapes.items()})
        for structure, count, shapes in header["kinds"]
    ]
    draws = [(name, number, checksum) for name, number, checksum in header["draws"]]
    for name, number, checksum in draws:
        if name not in files or type(number) is not int or not 0 <= number < len(kinds) or type(checksum) is not int:
            raise ValueError("draws")
    if not draws:
        raise ValueError("there is no draw")
    return Header(path, *texts, files, kinds, draws)


def _size(shape: Any) -> torch.Size:
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("shapes")
    return torch.Size(shape)


def _without_repetitions(tensors: Sequence[Tensor]) -> tuple[list[Tensor], dict[int, torch.Size]]:
    """Tensors for a file. One that repeats its numbers along a dimension, and is not larger than others, has them once."""
    most = max((tensor.numel() for tensor in tensors if 0 not in tensor.stride()), default=0)
    found, shapes = list[Tensor](), dict[int, torch.Size]()
    for number, tensor in enumerate(tensors):
        kept = tensor.detach()
        if tensor.numel() <= most:
            for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
                if stride == 0 and size > 1:
                    kept = kept.narrow(dim, 0, 1)
                    shapes[number] = tensor.shape
        found.append(kept.cpu().clone(memory_format=torch.contiguous_format))
    return found, shapes


def _with_repetitions(tensors: Sequence[Tensor], shapes: dict[int, torch.Size]) -> list[Tensor]:
    most = max((tensor.numel() for number, tensor in enumerate(tensors) if number not in shapes), default=0)
    if any(shape.numel() > most for shape in shapes.values()):
        raise ValueError("a tensor is larger than the others")
    return [tensor.expand(shapes[number]) if number in shapes else tensor for number, tensor in enumerate(tensors)]


def _checksum(header: dict[str, Any]) -> int:
    rest = {name: value for name, value in header.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _crc32(tensors: Sequence[Tensor]) -> int:
    """The checksum of tensors, with their types and shapes."""
    found = 0
    for tensor in tensors:
        found = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        if tensor.numel():
            found = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a cache of a teacher is written with safetensors: pip install safetensors, or pyro-kd[training]"
        ) from error
    return safetensors.torch
