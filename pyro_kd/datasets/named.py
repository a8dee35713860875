"""The loaders by the names that command-line programs use: ``--data NAME --data-root PATH``."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from pyro_kd.datasets.celeba import SOURCE as CELEBA
from pyro_kd.datasets.celeba import celeba
from pyro_kd.datasets.cifar10 import SOURCE as CIFAR10
from pyro_kd.datasets.cifar10 import cifar10
from pyro_kd.datasets.digits import digits_32
from pyro_kd.datasets.files import Source
from pyro_kd.datasets.hershey import hershey_strokes
from pyro_kd.datasets.iam_ondb import SOURCE as IAM_ONDB
from pyro_kd.datasets.iam_ondb import iam_ondb, iam_ondb_forms
from pyro_kd.datasets.idx import SOURCE as IDX
from pyro_kd.datasets.idx import idx
from pyro_kd.datasets.images import Images
from pyro_kd.datasets.images_npz import SOURCE as IMAGES_NPZ
from pyro_kd.datasets.images_npz import images_npz
from pyro_kd.datasets.stroke3 import SOURCE as STROKE3
from pyro_kd.datasets.stroke3 import stroke3
from pyro_kd.datasets.strokes import Strokes
from pyro_kd.datasets.svhn import SOURCE as SVHN
from pyro_kd.datasets.svhn import svhn
from pyro_kd.errors import CorruptDataError, listing, nearest

__all__ = ["IMAGES", "STROKES", "load_images", "load_strokes"]

_SPLITS = ("train", "valid", "test")
_HERSHEY_SIZES = {"train": 5000, "valid": 500, "test": 500}


def load_images(name: str, root: str | Path | None = None, train: bool = True, **options: Any) -> Images:
    """Load the training part or the test part of a set of images. The two have no image in common.

    Args:
        name: one of ``IMAGES``. ``"digits"`` are scikit-learn's at 32 x 32, with always the same 360 in the test part.
        root: the folder of the files, or the .npz file for ``"images-npz"``; not used by ``"digits"``.
        train: whether to load the training part.
        options: options of the loader, such as ``size=32`` for ``"celeba"`` and ``"idx"``.

    Raises:
        ValueError: there is no such name. The message lists the names.
        MissingDataError: ``root`` is not given, or a file is missing. The message says what to fetch.
        CorruptDataError: a file is truncated or has a different format.

    Example:
        >>> from pyro_kd.datasets import load_images
        >>> len(load_images("digits")), len(load_images("digits", train=False))
        (1437, 360)
    """
    _known(name, IMAGES)
    return IMAGES[name](root, train, **options)


def load_strokes(name: str, root: str | Path | None = None, split: str = "train", **options: Any) -> Strokes:
    """Load one part of a set of drawings. The parts have no drawing in common.

    Args:
        name: one of ``STROKES``. ``"hershey"`` writes 5,000 training words, and 500 for each other part. It takes the options
            of :func:`~pyro_kd.datasets.hershey_strokes`, with ``seed`` 0 by default. Of ``"iam-ondb"``, the validation and test
            parts have a tenth of the forms each, at least one, and always the same.
        root: the folder of the files, or the .npz file for ``"stroke3"``; not used by ``"hershey"``.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        options: options of the loader, such as ``limit=100`` for ``"iam-ondb"``.

    Raises:
        ValueError: there is no such name or part. The message lists those that exist.
        MissingDataError: ``root`` is not given, or a file is missing. The message says what to fetch.
        CorruptDataError: a file is truncated or has a different format.

    Example:
        >>> from pyro_kd.datasets import load_strokes
        >>> len(load_strokes("hershey", split="test", num=20))
        20
    """
    _known(name, STROKES)
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {listing(_SPLITS)}, not {split!r}")
    return STROKES[name](root, split, **options)


def _known(name: str, loaders: Iterable[str]) -> None:
    if name not in loaders:
        raise ValueError(f"there is no data set {name!r}.{nearest(name, loaders)} There are {listing(loaders)}.")


def _given(root: str | Path | None, source: Source) -> Path:
    if root is None:
        raise source.missing("the path ROOT, the option --data-root,")
    return Path(root)


def _digits(_: str | Path | None, train: bool) -> Images:
    return digits_32().split(360, seed=0)[0 if train else 1]


def _cifar10(root: str | Path | None, train: bool) -> Images:
    return cifar10(_given(root, CIFAR10), train)


def _svhn(root: str | Path | None, train: bool) -> Images:
    return svhn(_given(root, SVHN), "train" if train else "test")


def _celeba(root: str | Path | None, train: bool, **options: Any) -> Images:
    return celeba(_given(root, CELEBA), "train" if train else "test", **options)


def _images_npz(root: str | Path | None, train: bool) -> Images:
    return images_npz(_given(root, IMAGES_NPZ), "train" if train else "test")


def _idx(root: str | Path | None, train: bool, **options: Any) -> Images:
    return idx(_given(root, IDX), train, **options)


def _hershey(_: str | Path | None, split: str, *, num: int | None = None, seed: int = 0, **options: Any) -> Strokes:
    part = _SPLITS.index(split)
    return hershey_strokes(_HERSHEY_SIZES[split] if num is None else num, len(_SPLITS) * seed + part, **options)


def _iam_ondb(root: str | Path | None, split: str, **options: Any) -> Strokes:
    forms = iam_ondb_forms(_given(root, IAM_ONDB))
    if len(forms) < len(_SPLITS):
        raise CorruptDataError(f"{root} holds {len(forms)} forms, and three parts need at least 3")
    order = torch.randperm(len(forms), generator=torch.Generator().manual_seed(0)).tolist()
    tenth = max(len(forms) // 10, 1)
    part = {"train": order[2 * tenth :], "valid": order[:tenth], "test": order[tenth : 2 * tenth]}[split]
    return iam_ondb(_given(root, IAM_ONDB), forms={forms[index] for index in part}, **options)


def _stroke3(root: str | Path | None, split: str) -> Strokes:
    return stroke3(_given(root, STROKE3), split)


IMAGES: dict[str, Callable[..., Images]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "svhn": _svhn,
    "celeba": _celeba,
    "images-npz": _images_npz,
    "idx": _idx,
}
STROKES: dict[str, Callable[..., Strokes]] = {"hershey": _hershey, "iam-ondb": _iam_ondb, "stroke3": _stroke3}
