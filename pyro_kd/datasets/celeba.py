"""CelebA, aligned and cropped faces with 40 attributes, from the JPEG files and the two lists."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy
import torch

from pyro_kd.datasets.files import Source, reading
from pyro_kd.datasets.images import Images
from pyro_kd.errors import CorruptDataError

__all__ = ["celeba"]

SOURCE = Source(
    name="CelebA",
    page="https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (Align&Cropped Images)",
    fetch="img_align_celeba.zip, list_attr_celeba.txt and list_eval_partition.txt",
    layout="    ROOT/img_align_celeba/000001.jpg ... 202599.jpg\n"
    "    ROOT/list_attr_celeba.txt\n"
    "    ROOT/list_eval_partition.txt",
)
WIDTH, HEIGHT = 178, 218
_PARTS = {"train": ("0",), "valid": ("1",), "test": ("2",), "all": ("0", "1", "2")}


def celeba(root: str | Path, split: str = "train", size: int = 64, crop: int = 148, limit: int | None = None) -> Images:
    """Load faces: the square of ``crop`` pixels at the centre, resized. The labels are attributes, 1 if they apply.

    An image takes ``3 * size ** 2`` bytes, so the 162,770 of the training part take 2.0 GB at size 64, and 0.5 GB at size 32.

    Args:
        root: the folder of ``img_align_celeba`` and the two lists.
        split: ``"train"``, ``"valid"``, ``"test"`` or ``"all"``.
        size: height and width of the result, in pixels.
        crop: side of the square that is cut out, in pixels of the 178 x 218 of the files.
        limit: the most images to load, the first of the split.

    Raises:
        MissingDataError: a file is missing. The message says what to fetch.
        CorruptDataError: a file is truncated or has a different format, or the lists do not fit together.
        ModuleNotFoundError: Pillow is not installed.
        ValueError: there is no such split, or a number is out of range.

    References:
        Liu, Luo, Wang and Tang, Deep learning face attributes in the wild, 2015, arXiv:1411.7766.
    """
    if split not in _PARTS:
        raise ValueError(f"split must be one of {', '.join(map(repr, _PARTS))}, not {split!r}")
    if not 1 <= crop <= WIDTH or size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"crop must lie in 1 to {WIDTH}, size and limit be at least 1; they are {crop}, {size} and {limit}")
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("CelebA is read with Pillow: pip install pillow, or pyro-kd[examples]") from error
    root = Path(root)
    folder, list_of_parts, list_of_attributes = (
        SOURCE.need(root / name) for name in ("img_align_celeba", "list_eval_partition.txt", "list_attr_celeba.txt")
    )
    with reading(list_of_parts):
        parts = _parts(list_of_parts)
        names = [name for name, number in parts.items() if number in _PARTS[split]]
        if not names:
            raise CorruptDataError(f"it lists no image of part {' or '.join(_PARTS[split])}")
    with reading(list_of_attributes):
        classes, attributes = _attributes(list_of_attributes)
        _same_images(parts, attributes)
    names = names[:limit]
    labels = torch.tensor([[value == "1" for value in attributes[name]] for name in names]).long()
    images = torch.empty(len(names), 3, size, size, dtype=torch.uint8)
    for index, name in enumerate(names):
        images[index] = torch.from_numpy(_face(Image, SOURCE.need(folder / name), size, crop))
    return Images(images, labels, classes)


def _parts(path: Path) -> dict[str, str]:
    """The number of the part that each image belongs to, by the name of its file."""
    found: dict[str, str] = {}
    for count, line in enumerate(path.read_text(encoding="ascii").splitlines(), 1):
        name, number = line.split()
        if number not in _PARTS["all"] or Path(name).name != name:
            raise CorruptDataError(f"line {count} must be a file's name and 0, 1 or 2, and is {line[:80]!r}")
        if name in found:
            raise CorruptDataError(f"line {count} lists {name!r} again")
        found[name] = number
    return found


def _attributes(path: Path) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """The names of the attributes, and their values, -1 or 1, by the name of an image's file."""
    number, head, *lines = path.read_text(encoding="ascii").splitlines()
    if len(lines) != int(number):
        raise CorruptDataError(f"its first line states {int(number)} images, and it lists {len(lines)}")
    classes = tuple(head.split())
    if len(set(classes)) != len(classes) or not classes:
        raise CorruptDataError(f"its second line must be the names of the attributes, each once: {head[:80]!r}")
    rows: dict[str, list[str]] = {}
    for count, line in enumerate(lines, 3):
        name, *values = line.split()
        if len(values) != len(classes) or not set(values) <= {"-1", "1"}:
            raise CorruptDataError(f"line {count} must be a file's name and {len(classes)} times -1 or 1: {line[:80]!r}")
        if name in rows:
            raise CorruptDataError(f"line {count} lists {name!r} again")
        rows[name] = values
    return classes, rows


def _same_images(parts: Collection[str], attributes: Collection[str]) -> None:
    """Both lists are of the same images; one that is cut short is not."""
    for name in parts:
        if name not in attributes:
            raise CorruptDataError(f"it does not list {name!r}, which list_eval_partition.txt does")
    for name in attributes:
        if name not in parts:
            raise CorruptDataError(f"it lists {name!r}, which list_eval_partition.txt does not")


def _face(image: Any, path: Path, size: int, crop: int) -> numpy.ndarray[Any, Any]:
    with reading(path), image.open(path, formats=("JPEG",)) as picture:
        if picture.size != (WIDTH, HEIGHT):
            raise CorruptDataError(f"it must have {WIDTH} x {HEIGHT} pixels, and has {picture.size[0]} x {picture.size[1]}")
        left, top = (WIDTH - crop) // 2, (HEIGHT - crop) // 2
        square = picture.convert("RGB").resize(
            (size, size), image.Resampling.BILINEAR, box=(left, top, left + crop, top + crop)
        )
        return numpy.array(square).transpose(2, 0, 1)
