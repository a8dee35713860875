"""Arrays out of an .npz file, without NumPy's unpickling."""

from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy

from pyro_kd.datasets.files import reading
from pyro_kd.datasets.unpickling import unpickle_arrays
from pyro_kd.errors import CorruptDataError

__all__ = ["npz_array", "npz_names", "npz_objects"]


def npz_names(path: Path) -> list[str]:
    """The names of the arrays in the file.

    Raises:
        CorruptDataError: it is no .npz file, or truncated.
    """
    with reading(path), ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def npz_array(path: Path, name: str) -> numpy.ndarray[Any, Any]:
    """An array of numbers or strings.

    Raises:
        CorruptDataError: there is none of the name, or it holds objects, or the file is damaged.
    """
    with reading(path), ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        return numpy.lib.format.read_array(stream, allow_pickle=False)


def npz_objects(path: Path, name: str) -> list[Any]:
    """The entries of an array of objects; see :mod:`pyro_kd.datasets.unpickling` for what they may be.

    Raises:
        CorruptDataError: there is none of the name, or it holds numbers, or something else than arrays and plain values.
    """
    with reading(path), ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        read_header = {
            (1, 0): numpy.lib.format.read_array_header_1_0,
            (2, 0): numpy.lib.format.read_array_header_2_0,
        }[numpy.lib.format.read_magic(stream)]
        shape, _, dtype = read_header(stream)
        if dtype != numpy.dtype(object):
            raise CorruptDataError(f"{name!r} must hold one array a drawing, and is one array of {dtype}")
        found = unpickle_arrays(stream)  # type: ignore[arg-type]
        if not isinstance(found, list) or shape != (len(found),):
            raise CorruptDataError(f"{name!r} does not hold the {shape} objects that it states")
        return found
