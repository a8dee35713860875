"""Images from an .npz file without pickles."""

from pathlib import Path
from typing import Any

import numpy
import torch

from pyro_kd.datasets.files import Source, reading
from pyro_kd.datasets.images import Images
from pyro_kd.datasets.npz import npz_array, npz_names
from pyro_kd.errors import CorruptDataError, nearest

__all__ = ["images_npz"]

SOURCE = Source(
    name="your own images",
    page="wherever they are",
    fetch="the images, written by numpy.savez(ROOT, train_images=..., test_images=...),",
    layout="    ROOT, which is the .npz file itself: anywhere",
)
_MOST_UNNAMED = 10_000  # classes that need no names even if there are fewer images


def images_npz(path: str | Path, split: str = "train") -> Images:
    """Load one part of a file of images.

    Args:
        path: the .npz file. It holds ``{split}_images``, uint8 of shape (n, height, width) or (n, height, width, channels)
            with 1 or 3 channels; it may hold ``{split}_labels``, integers of shape (n,) from 0, or 0 and 1 of shape
            (n, attributes), and ``classes``, the strings that name the classes or attributes. Nothing else may be in it.
        split: the part, such as ``"train"`` or ``"test"``.

    Returns:
        The images. If the file has no labels, they are all of the class ``"unlabelled"``; if it has no names, the classes
        are ``"0"``, ``"1"`` and so on.

    Raises:
        MissingDataError: there is no such file.
        CorruptDataError: the file has no such part, is truncated or damaged, its arrays do not fit together, or one is a
            pickle or has an unknown name.
    """
    path = SOURCE.need(Path(path))
    with reading(path):
        names = npz_names(path)
        if f"{split}_images" not in names:
            raise CorruptDataError(f"there is no {split + '_images'!r} in it, but {sorted(names)}")
        _understand(names)
        pixels = npz_array(path, f"{split}_images")
        if pixels.dtype != numpy.uint8 or not (pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] in (1, 3))):
            raise CorruptDataError(
                f"{split}_images must be uint8 of shape (n, height, width) or (n, height, width, 1 or 3), and is "
                f"{pixels.dtype} of shape {pixels.shape}"
            )
        if not pixels.size:
            raise CorruptDataError(f"{split}_images is empty, of shape {pixels.shape}")
        channels_first = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        images = torch.from_numpy(numpy.ascontiguousarray(channels_first))
        if f"{split}_labels" not in names:
            return Images(images, torch.zeros(len(images), dtype=torch.int64), ("unlabelled",))
        labels = npz_array(path, f"{split}_labels")
        if labels.dtype.kind not in "iub":
            raise CorruptDataError(f"{split}_labels must hold integers, not {labels.dtype}")
        classes = _named(path) if "classes" in names else _numbered(path, labels, names)
        return Images(images, torch.from_numpy(labels.astype(numpy.int64)), classes)


def _understand(names: list[str]) -> None:
    """Refuse an array that would be skipped: labels under a misspelt name would leave the images unlabelled."""
    parts = [name.removesuffix("_images") for name in names if name.endswith("_images")]
    understood = ["classes", *(f"{part}_{kind}" for part in parts for kind in ("images", "labels"))]
    for name in names:
        if name not in understood:
            raise CorruptDataError(
                f"{name!r} in it is not understood.{nearest(name, understood)} There may be images, labels and classes"
            )


def _named(path: Path) -> tuple[str, ...]:
    """The names of the classes that the file gives."""
    named = npz_array(path, "classes")
    if named.dtype.kind not in "US" or named.ndim != 1:
        raise CorruptDataError(f"classes must be strings of shape (classes,), not {named.dtype} of {named.shape}")
    return tuple(named.astype(str).tolist())


def _numbered(path: Path, labels: numpy.ndarray[Any, Any], names: list[str]) -> tuple[str, ...]:
    """Numbers as names of classes, the same for all parts."""
    if labels.ndim == 2:
        return tuple(str(index) for index in range(labels.shape[1]))
    parts = [npz_array(path, name) for name in sorted(names) if name.endswith("_labels")]
    largest, rows = max(int(part.max(initial=0)) for part in parts), sum(len(part) for part in parts)
    if largest >= max(rows, _MOST_UNNAMED):
        raise CorruptDataError(
            f"{rows} labels go up to {largest}. Where that is right, add the array 'classes' of their names"
        )
    return tuple(str(index) for index in range(largest + 1))
