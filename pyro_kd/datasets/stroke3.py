"""Drawings in stroke-3 form from an .npz file, concatenated or in the layout of sketch-rnn's data (QuickDraw)."""

from pathlib import Path
from typing import Any

import numpy
import torch

from pyro_kd.datasets.files import Source, reading
from pyro_kd.datasets.npz import npz_array, npz_names, npz_objects
from pyro_kd.datasets.strokes import Strokes
from pyro_kd.errors import CorruptDataError, nearest

__all__ = ["stroke3"]

SOURCE = Source(
    name="QuickDraw",
    page="https://github.com/googlecreativelab/quickdraw-dataset (Sketch-RNN QuickDraw Dataset)",
    fetch="the .npz file of a category, as cat.npz,",
    layout="    ROOT, which is the file itself: anywhere",
)


def stroke3(path: str | Path, split: str = "train") -> Strokes:
    """Load one part of a file of drawings.

    Two layouts are read. The first has the arrays ``{split}_strokes``, all points concatenated, shape (total points, 3), and
    ``{split}_lengths``, shape (n,). The second is that of sketch-rnn: ``train``, ``valid`` and ``test`` are arrays of
    objects, with one array of shape (length, 3) per drawing. Those are pickles; see :mod:`pyro_kd.datasets.unpickling` for how
    they are read.

    Args:
        path: the .npz file.
        split: the part, ``"train"``, ``"valid"`` or ``"test"``.

    Raises:
        MissingDataError: the file is missing. The message says what to fetch.
        CorruptDataError: the file has no such part, or is truncated, or its arrays do not fit together, or one holds
            anything but arrays.

    References:
        Ha and Eck, A neural representation of sketch drawings, 2017, arXiv:1704.03477.
    """
    path = SOURCE.need(Path(path))
    with reading(path):
        names = npz_names(path)
        _understand(names)
        if f"{split}_strokes" in names:
            lengths = npz_array(path, f"{split}_lengths")
            if lengths.dtype.kind not in "iu":
                raise CorruptDataError(f"{split}_lengths must hold integers, not {lengths.dtype}")
            points = _points(npz_array(path, f"{split}_strokes"), f"{split}_strokes")
        elif split in names:
            drawings = [_points(drawing, f"a drawing of {split!r}") for drawing in npz_objects(path, split)]
            if not drawings:
                raise CorruptDataError(f"{split!r} holds no drawing")
            points, lengths = numpy.concatenate(drawings), numpy.array([len(drawing) for drawing in drawings])
        else:
            raise CorruptDataError(f"there is neither {split + '_strokes'!r} nor {split!r} in it, but {sorted(names)}")
        if not len(lengths):
            raise CorruptDataError(f"{split!r} holds no drawing")
        return Strokes(torch.from_numpy(points), torch.from_numpy(lengths.astype(numpy.int64)))


def _understand(names: list[str]) -> None:
    """Refuse a part whose points or lengths have a misspelt name, and one that is there in both layouts."""
    for name in names:
        part, _, kind = name.rpartition("_")
        other = f"{part}_{'lengths' if kind == 'strokes' else 'strokes'}"
        if kind in ("strokes", "lengths") and other not in names:
            raise CorruptDataError(f"there is {name!r} in it, and no {other!r}.{nearest(other, names)}")
        if kind == "strokes" and part in names:
            raise CorruptDataError(f"the part {part!r} is in it twice: as {part!r} and as {name!r}")


def _points(array: Any, name: str) -> numpy.ndarray[Any, Any]:
    if not isinstance(array, numpy.ndarray) or array.dtype.kind not in "iuf" or array.ndim != 2 or array.shape[1] != 3:
        form = f"{array.dtype} of shape {array.shape}" if isinstance(array, numpy.ndarray) else type(array).__name__
        raise CorruptDataError(f"{name} must be numbers of shape (points, 3), and is {form}")
    return array.astype(numpy.float32)
