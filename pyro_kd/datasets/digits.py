"""Handwritten digits: the 1797 images of 8 x 8 pixels that come with scikit-learn."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_kd.datasets.images import Images

__all__ = ["Digits", "digits", "digits_32"]


@dataclass(frozen=True, slots=True)
class Digits:
    """Images of handwritten digits.

    Attributes:
        images: grey values from 0 to 1, shape (n, 8, 8).
        labels: the digits, shape (n,).
    """

    images: Tensor
    labels: Tensor

    def split(self, held_out: int, seed: int) -> tuple["Digits", "Digits"]:
        """Split into two disjoint random parts, the second with ``held_out`` images.

        Raises:
            ValueError: there are fewer images.
        """
        if not 0 <= held_out <= len(self.images):
            raise ValueError(f"held_out must lie in 0 to {len(self.images)}, the number of images, and is {held_out}")
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        first, second = order[held_out:], order[:held_out]
        return Digits(self.images[first], self.labels[first]), Digits(self.images[second], self.labels[second])


def digits() -> Digits:
    """Load the digits.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.

    References:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998 (its test part).

    Example:
        >>> from pyro_kd.datasets import digits
        >>> digits().images.shape
        torch.Size([1797, 8, 8])
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn: pip install scikit-learn, or pyro-kd[examples]"
        ) from error
    bunch = load_digits()
    return Digits(torch.tensor(bunch.images, dtype=torch.float32) / 16, torch.tensor(bunch.target))


def digits_32() -> Images:
    """Load the digits enlarged to 32 x 32 pixels by bilinear interpolation, as grey values from 0 to 255 in one channel.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.

    Example:
        >>> from pyro_kd.datasets import digits_32
        >>> digits_32().images.shape
        torch.Size([1797, 1, 32, 32])
    """
    small = digits()
    large = torch.nn.functional.interpolate(small.images.unsqueeze(1), size=(32, 32), mode="bilinear", align_corners=False)
    return Images((large * 255).round().to(torch.uint8), small.labels.long(), tuple("0123456789"))
