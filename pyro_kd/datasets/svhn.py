"""Street View House Numbers, cropped digits, from the .mat files."""

from pathlib import Path

import numpy
import torch

from pyro_kd.datasets.files import Source, reading
from pyro_kd.datasets.images import Images
from pyro_kd.datasets.mat import check_mat
from pyro_kd.errors import CorruptDataError

__all__ = ["svhn"]

SOURCE = Source(
    name="SVHN",
    page="http://ufldl.stanford.edu/housenumbers/ (format 2, cropped digits)",
    fetch="train_32x32.mat, test_32x32.mat and, if wanted, extra_32x32.mat",
    layout="    ROOT/train_32x32.mat\n    ROOT/test_32x32.mat\n    ROOT/extra_32x32.mat",
)


def svhn(root: str | Path, split: str = "train") -> Images:
    """Load digits from house numbers, 3 x 32 x 32. The class is the digit.

    Reading takes about twice the memory of the images: 73,257 of them (``"train"``, 225 MB), 26,032 (``"test"``, 80 MB) or
    531,131 (``"extra"``, 1.6 GB).

    Args:
        root: the folder of the .mat files.
        split: ``"train"``, ``"test"`` or ``"extra"``.

    Raises:
        MissingDataError: the file is missing. The message says what to fetch.
        CorruptDataError: the file is truncated or damaged, or has a different format.
        ModuleNotFoundError: SciPy is not installed.
        ValueError: there is no such split.

    References:
        Netzer et al., Reading digits in natural images with unsupervised feature learning, NIPS workshop, 2011.
    """
    if split not in ("train", "test", "extra"):
        raise ValueError(f"split must be 'train', 'test' or 'extra', not {split!r}")
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("SVHN is read with SciPy: pip install scipy, or pyro-kd[examples]") from error
    path = SOURCE.need(Path(root) / f"{split}_32x32.mat")
    with reading(path):
        check_mat(path.read_bytes(), ("X", "y"))
        content = loadmat(str(path), variable_names=("X", "y"))
        absent = [name for name in ("X", "y") if name not in content]
        if absent:
            raise CorruptDataError(f"it has no variable {absent[0]!r}, and is no file of SVHN's format 2")
        pixels, labels = content["X"], content["y"].reshape(-1)
        if pixels.dtype != numpy.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3) or not pixels.shape[3]:
            raise CorruptDataError(f"X must be uint8 of shape (32, 32, 3, n), and is {pixels.dtype} of {pixels.shape}")
        if labels.shape != (pixels.shape[3],) or labels.dtype.kind not in "iuf":
            raise CorruptDataError(f"y must hold {pixels.shape[3]} numbers, and holds {labels.size} of {labels.dtype}")
        if not numpy.isin(labels, numpy.arange(1, 11)).all():
            raise CorruptDataError(f"y must hold 1 to 9, and 10 for 0, and goes from {labels.min()} to {labels.max()}")
        return Images(
            torch.from_numpy(numpy.ascontiguousarray(pixels.transpose(3, 2, 0, 1))),
            torch.from_numpy(labels.astype(numpy.int64) % 10),
            tuple(str(digit) for digit in range(10)),
        )
