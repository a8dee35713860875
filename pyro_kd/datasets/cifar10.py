"""CIFAR-10 from its python batches, read without running code."""

from pathlib import Path
from typing import Any

import numpy
import torch

from pyro_kd.datasets.files import Source, reading
from pyro_kd.datasets.images import Images
from pyro_kd.datasets.unpickling import unpickle_arrays
from pyro_kd.errors import CorruptDataError

__all__ = ["cifar10"]

SOURCE = Source(
    name="CIFAR-10",
    page="https://www.cs.toronto.edu/~kriz/cifar.html",
    fetch="the python version, cifar-10-python.tar.gz,",
    layout="    ROOT/cifar-10-batches-py/data_batch_1 ... data_batch_5\n"
    "    ROOT/cifar-10-batches-py/test_batch\n"
    "    ROOT/cifar-10-batches-py/batches.meta",
)


def cifar10(root: str | Path, train: bool = True) -> Images:
    """Load the 50,000 training images or the 10,000 test images, of 3 x 32 x 32.

    The files are pickles; see :mod:`pyro_kd.datasets.unpickling` for how they are read.

    Args:
        root: the folder that holds ``cifar-10-batches-py``, or that folder itself.
        train: whether to load the five training batches, else the test batch.

    Raises:
        MissingDataError: a file is missing. The message says what to fetch.
        CorruptDataError: a file is truncated, has a different format, or holds anything but arrays and plain values.

    References:
        Krizhevsky, Learning multiple layers of features from tiny images, technical report, University of Toronto, 2009.
    """
    folder = Path(root)
    if (folder / "cifar-10-batches-py").exists():
        folder = folder / "cifar-10-batches-py"
    names = [f"data_batch_{number}" for number in range(1, 6)] if train else ["test_batch"]
    for name in ("batches.meta", *names):
        SOURCE.need(folder / name)
    with reading(folder / "batches.meta"):
        found = _entry(_read(folder / "batches.meta"), "label_names")
        classes = tuple(name.decode("ascii") if isinstance(name, bytes) else str(name) for name in found)
    batches = [_batch(folder / name, classes) for name in names]
    return Images(torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches]), classes)


def _batch(path: Path, classes: tuple[str, ...]) -> Images:
    with reading(path):
        content = _read(path)
        data, labels = _entry(content, "data"), _entry(content, "labels")
        if not isinstance(data, numpy.ndarray) or data.dtype != numpy.uint8 or data.shape != (len(labels), 3072):
            raise CorruptDataError(
                f"its data must be a uint8 array of shape ({len(labels)}, 3072), one row a label, and is {_form(data)}"
            )
        if not len(labels) or not all(type(label) is int for label in labels):
            raise CorruptDataError("its labels must be a list of integers, and not empty")
        return Images(torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels), classes)


def _read(path: Path) -> Any:
    with path.open("rb") as stream:
        return unpickle_arrays(stream)


def _entry(content: Any, key: str) -> Any:
    if isinstance(content, dict):
        for name in (key.encode(), key):
            if name in content:
                return content[name]
    raise CorruptDataError(f"it has no entry {key!r}, and is no batch of CIFAR-10's python version")


def _form(value: Any) -> str:
    return f"{value.dtype} of shape {value.shape}" if isinstance(value, numpy.ndarray) else f"a {type(value).__name__}"
