"""Read arrays from an .npz file, without NumPy's unpickling, and check every size and checksum that the file states.

An .npz file is a ZIP archive of .npy members, each with a header of shape and data type and the bytes of the array. A member is read
to its end, where its checksum is compared. Its size must match its shape, and be no more than the file can hold.
"""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, ZipInfo

import numpy

from pyro_kd.datasets.files import reading
from pyro_kd.datasets.unpickling import unpickle_arrays
from pyro_kd.errors import CorruptDataError, nearest

__all__ = ["npz_array", "npz_names", "npz_objects"]

_EXPANSION = 1100  # deflate makes at most 1032 bytes of one
_MOST_BETWEEN = 24  # bytes after a member that may repeat its sizes; a further member takes more
_HEADERS = {(1, 0): numpy.lib.format.read_array_header_1_0, (2, 0): numpy.lib.format.read_array_header_2_0}


def npz_names(path: Path) -> list[str]:
    """The names of the arrays in the file.

    Raises:
        CorruptDataError: the file is truncated or not an .npz file, holds something that its directory does not list, or has two
            arrays of the same name.
    """
    with reading(path), ZipFile(path) as archive:
        _require_all_listed(archive, path)
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CorruptDataError(f"{path} has more than one array {twice[0]!r}")
    return names


def _require_all_listed(archive: ZipFile, path: Path) -> None:
    """Refuse a file with gaps between its members: a damaged directory may skip one, such as the labels."""
    end = 0
    with path.open("rb") as file:
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            if not 0 <= info.header_offset - end <= _MOST_BETWEEN:
                raise CorruptDataError(f"its directory lists nothing for the bytes {end} to {info.header_offset}")
            file.seek(info.header_offset + 26)
            end = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))) + info.compress_size
    if not 0 <= archive.start_dir - end <= _MOST_BETWEEN:
        raise CorruptDataError(f"its directory lists nothing for the bytes {end} to {archive.start_dir}")


def npz_array(path: Path, name: str) -> numpy.ndarray[Any, Any]:
    """Read an array of numbers or strings.

    Raises:
        CorruptDataError: there is no array of this name, it holds objects, or the file is damaged.
    """
    with reading(path), ZipFile(path) as archive:
        with _member(archive, name) as stream:
            shape, dtype = _header(stream, name)
            stated, held = math.prod(shape) * dtype.itemsize, _info(archive, name).file_size - stream.tell()
            if not dtype.hasobject and (stated != held or not dtype.itemsize):
                raise CorruptDataError(f"{name!r} states {dtype} of shape {shape}, {stated} bytes, and holds {held}")
        with _member(archive, name) as stream:
            return numpy.lib.format.read_array(stream, allow_pickle=False)  # refuses objects


def npz_objects(path: Path, name: str) -> list[Any]:
    """Read the entries of an array of objects. See :mod:`pyro_kd.datasets.unpickling` for what they may be.

    Raises:
        CorruptDataError: there is no array of this name, it holds numbers, or an entry is not an array or a plain value.
    """
    with reading(path), ZipFile(path) as archive, _member(archive, name) as stream:
        shape, dtype = _header(stream, name)
        if dtype != numpy.dtype(object):
            raise CorruptDataError(f"{name!r} must hold one array per drawing, but is a single array of {dtype}")
        found = unpickle_arrays(stream)
        if not isinstance(found, list) or shape != (len(found),):
            raise CorruptDataError(f"{name!r} does not hold the {shape} objects that it states")
        return found


@contextmanager
def _member(archive: ZipFile, name: str) -> Iterator[IO[bytes]]:
    """The bytes of a member. What is left at the end is read too, up to the checksum."""
    with archive.open(_info(archive, name)) as stream:
        yield stream
        while stream.read(1 << 20):
            pass


def _info(archive: ZipFile, name: str) -> ZipInfo:
    """What the archive states about a member, if the file can hold that much."""
    if f"{name}.npy" not in archive.namelist():
        raise CorruptDataError(f"there is no {name!r} in it.{nearest(f'{name}.npy', archive.namelist())}")
    info = archive.getinfo(f"{name}.npy")
    size = Path(str(archive.filename)).stat().st_size
    if info.compress_size > size or info.file_size > _EXPANSION * info.compress_size:
        raise CorruptDataError(
            f"{name!r} states {info.file_size} bytes, packed into {info.compress_size} of a file of {size}"
        )
    return info


def _header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], numpy.dtype[Any]]:
    version = numpy.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise CorruptDataError(f"{name!r} is written in version {version} of NumPy's format, and 1.0 and 2.0 are read")
    shape, _, dtype = _HEADERS[version](stream)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise CorruptDataError(f"{name!r} states the shape {shape}")
    return shape, dtype
