"""Images from an .npz file without pickles."""

from pathlib import Path

import numpy
import torch

from pyro_kd.datasets.files import Source, reading
from pyro_kd.datasets.images import Images
from pyro_kd.datasets.npz import npz_array, npz_names
from pyro_kd.errors import CorruptDataError

__all__ = ["images_npz"]

SOURCE = Source(
    name="your own images",
    page="wherever they are",
    fetch="the images, written by numpy.savez(ROOT, train_images=..., test_images=...),",
    layout="    ROOT, which is the .npz file itself: anywhere",
)


def images_npz(path: str | Path, split: str = "train") -> Images:
    """Load one part of a file of images.

    Args:
        path: the .npz file. It holds ``{split}_images``, uint8 of shape (n, height, width) or (n, height, width, channels)
            with 1 or 3 channels; it may hold ``{split}_labels``, integers of shape (n,) from 0, or 0 and 1 of shape
            (n, attributes), and ``classes``, the strings that name the classes or attributes.
        split: the part, such as ``"train"`` or ``"test"``.

    Returns:
        the images. Where the file has no labels they are all of one class, ``"unlabelled"``; where it has no names the classes
        are ``"0"``, ``"1"`` and so on.

    Raises:
        MissingDataError: there is no such file.
        CorruptDataError: the file has no such part, or is truncated, or its arrays do not fit together, or one is a pickle.
    """
    path = SOURCE.need(Path(path))
    with reading(path):
        names = npz_names(path)
        if f"{split}_images" not in names:
            raise CorruptDataError(f"there is no {split + '_images'!r} in it, but {sorted(names)}")
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
        if "classes" in names:
            named = npz_array(path, "classes")
            if named.dtype.kind not in "US" or named.ndim != 1:
                raise CorruptDataError(f"classes must be strings of shape (classes,), not {named.dtype} of {named.shape}")
            classes = tuple(named.astype(str).tolist())
        else:
            parts = [npz_array(path, name) for name in sorted(names) if name.endswith("_labels")]  # one naming for all parts
            number = labels.shape[1] if labels.ndim == 2 else max(int(part.max(initial=0)) for part in parts) + 1
            classes = tuple(str(index) for index in range(number))
        return Images(images, torch.from_numpy(labels.astype(numpy.int64)), classes)
