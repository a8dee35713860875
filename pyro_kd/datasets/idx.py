"""Images in the IDX format: MNIST, Fashion-MNIST, KMNIST and EMNIST, from the files as published, compressed or not."""

import gzip
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy
import torch

from pyro_kd.datasets.files import Source, reading
from pyro_kd.datasets.images import Images
from pyro_kd.errors import CorruptDataError, listing, nearest

__all__ = ["idx"]

SOURCE = Source(
    name="MNIST, or of Fashion-MNIST, KMNIST or EMNIST,",
    page="the page of its authors (EMNIST: https://www.nist.gov/itl/products-and-services/emnist-dataset)",
    fetch="the four files of images and labels, and for EMNIST the mapping,",
    layout="    ROOT/train-images-idx3-ubyte.gz    (EMNIST: ROOT/emnist-balanced-train-images-idx3-ubyte.gz)\n"
    "    ROOT/train-labels-idx1-ubyte.gz\n"
    "    ROOT/t10k-images-idx3-ubyte.gz     (EMNIST: ROOT/emnist-balanced-test-images-idx3-ubyte.gz)\n"
    "    ROOT/t10k-labels-idx1-ubyte.gz\n"
    "    (EMNIST: ROOT/emnist-balanced-mapping.txt)\n"
    "Unpacked files without .gz are read as well.",
)
_NAME = re.compile(
    r"(?:(?P<prefix>.+)-)?(?P<part>train|t10k|test)-(?P<kind>images|labels)[-.]idx[13]-ubyte(?:\.gz)?", re.IGNORECASE
)
_UNSIGNED_BYTES = 0x08


def idx(
    root: str | Path,
    train: bool = True,
    *,
    prefix: str | None = None,
    size: int | None = None,
    transposed: bool | None = None,
) -> Images:
    """Load the training part or the test part of a folder of IDX files, as grey values in one channel.

    Args:
        root: the folder of the files.
        train: whether to load the training part.
        prefix: what precedes ``train`` and ``test`` in the names of the files, such as ``"emnist-letters"``. It is needed where the
            folder has the files of several data sets.
        size: height and width of the result: the images are padded with zeros on all sides, 28 pixels to 32 by 2 on each.
            Default: the size of the files.
        transposed: whether the files hold each image with its rows and columns exchanged, which is undone here. Default: true if the
            prefix starts with ``"emnist"``, whose files are written so.

    Returns:
        The images, shape (n, 1, height, width). The classes are named by EMNIST's mapping if its file is there: a label is then its
        place in the mapping, which for "letters" is one less than the number in the file. Otherwise the names are "0", "1" and so on.

    Raises:
        MissingDataError: a file is missing. The message says what to fetch.
        CorruptDataError: a file is truncated or damaged, has a different format, or does not fit the others.
        ValueError: the folder has files of several data sets and no ``prefix`` is given, or the images are larger than ``size``.

    References:
        LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied to document recognition, 1998 (MNIST). Xiao, Rasul and
        Vollgraf, 2017, arXiv:1708.07747 (Fashion-MNIST). Clanuwat et al., 2018, arXiv:1812.01718 (KMNIST). Cohen, Afshar, Tapson and
        van Schaik, 2017, arXiv:1702.05373 (EMNIST).

    Example:
        >>> import numpy, pathlib, struct, tempfile
        >>> from pyro_kd.datasets import idx
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> header = bytes([0, 0, 8, 3]) + struct.pack(">III", 5, 28, 28)
        >>> _ = (folder / "train-images-idx3-ubyte").write_bytes(header + bytes(5 * 28 * 28))
        >>> _ = (folder / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 5]) + bytes([3, 1, 4, 1, 5]))
        >>> idx(folder, size=32).images.shape
        torch.Size([5, 1, 32, 32])
    """
    found, prefix = _files(Path(root), prefix)
    part = "train" if train else "test"
    for kind in ("images", "labels"):
        if (part, kind) not in found:
            name = f"{prefix + '-' if prefix else ''}{'train' if train else 'test' if prefix else 't10k'}-{kind}"
            raise SOURCE.missing(Path(root) / f"{name}-idx{3 if kind == 'images' else 1}-ubyte")
    path = found[part, "images"]
    with reading(path):
        pixels = _array(path, dimensions=3)
        if not pixels.size:
            raise CorruptDataError(f"it holds no image: its shape is {pixels.shape}")
    labels = {part: _labels(path) for (part, kind), path in found.items() if kind == "labels"}
    with reading(found[part, "labels"]):
        if len(labels[part]) != len(pixels):
            raise CorruptDataError(f"it holds {len(labels[part])} labels, and {path.name} {len(pixels)} images")
        codes, classes = _classes(Path(root), prefix, labels)
        index = numpy.searchsorted(codes, labels[part])
    if prefix.lower().startswith("emnist") if transposed is None else transposed:
        pixels = pixels.transpose(0, 2, 1)
    images = torch.from_numpy(numpy.array(pixels, order="C")).unsqueeze(1)
    return Images(images if size is None else _padded(images, size), torch.from_numpy(index.astype(numpy.int64)), classes)


def _files(root: Path, prefix: str | None) -> tuple[dict[tuple[str, str], Path], str]:
    """The files of one data set by part and kind, an unpacked file before a packed one, and their prefix."""
    by_prefix: dict[str, dict[tuple[str, str], Path]] = {}
    for path in sorted(root.iterdir() if root.is_dir() else (), reverse=True):  # .gz first
        match = _NAME.fullmatch(path.name)
        if match:
            part = "train" if match["part"].lower() == "train" else "test"
            by_prefix.setdefault(match["prefix"] or "", {})[part, match["kind"].lower()] = path
    if prefix is None:
        if len(by_prefix) > 1:
            raise ValueError(f"{root} holds several data sets: choose one with prefix=, one of {listing(sorted(by_prefix))}")
        prefix = next(iter(by_prefix), "")
    elif by_prefix and prefix not in by_prefix:
        raise ValueError(
            f"{root} has no files with the prefix {prefix!r}.{nearest(prefix, by_prefix)} It has {listing(sorted(by_prefix))}"
        )
    return by_prefix.get(prefix, {}), prefix


def _labels(path: Path) -> numpy.ndarray[Any, Any]:
    """The labels of a part, shape (n,)."""
    with reading(path):
        return _array(path, dimensions=1)


def _array(path: Path, dimensions: int) -> numpy.ndarray[Any, Any]:
    """The bytes of a file: two zeros, the type, the number of dimensions, their sizes as big-endian integers, and the values."""
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        content = gzip.decompress(content)  # compares the checksum
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, _UNSIGNED_BYTES, dimensions]) or len(content) < start:
        raise CorruptDataError(
            f"an IDX file of unsigned bytes in {dimensions} dimension(s) starts with 00 00 08 0{dimensions} and as many sizes, and "
            f"this one with {content[:start].hex(' ') or 'nothing'}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if math.prod(shape) != len(content) - start:
        raise CorruptDataError(f"it states the shape {shape}, {math.prod(shape)} bytes, and holds {len(content) - start}")
    return numpy.frombuffer(content, numpy.uint8, offset=start).reshape(shape)


def _classes(root: Path, prefix: str, labels: dict[str, numpy.ndarray[Any, Any]]) -> tuple[list[int], tuple[str, ...]]:
    """The label and the name of each class, the same for both parts."""
    largest = max(int(part.max(initial=0)) for part in labels.values())
    mapping = root / f"{prefix}-mapping.txt"
    if not mapping.exists():
        return list(range(largest + 1)), tuple(str(index) for index in range(largest + 1))
    with reading(mapping):
        rows = [[int(word) for word in line.split()] for line in mapping.read_text(encoding="ascii").splitlines()]
        named = {label: "".join(map(chr, codes)) for label, *codes in rows if codes}
        if len(named) != len(rows) or len(set(named.values())) != len(rows):
            raise CorruptDataError("each line must have a label and the code of its character, and none twice")
    unnamed = set(numpy.unique(numpy.concatenate(list(labels.values()))).tolist()) - set(named)
    if unnamed:
        raise CorruptDataError(f"it has the label {min(unnamed)}, which {mapping.name} does not name")
    return sorted(named), tuple(named[label] for label in sorted(named))


def _padded(images: torch.Tensor, size: int) -> torch.Tensor:
    """The images, shape (n, 1, height, width), in the middle of zeros, shape (n, 1, size, size)."""
    height, width = images.shape[2:]
    if size < max(height, width):
        raise ValueError(f"the images have {height} x {width} pixels, which is more than size={size}")
    top, left = (size - height) // 2, (size - width) // 2
    return torch.nn.functional.pad(images, (left, size - width - left, top, size - height - top))
