"""Labelled images in memory, as bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Images"]


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Images of equal size, each with a class or several attributes.

    Attributes:
        images: grey or colour values from 0 to 255, uint8, shape (n, channels, height, width).
        labels: int64, the class of each image from 0, shape (n,); or attributes 0 and 1, shape (n, attributes).
        classes: names of the classes or of the attributes.

    Raises:
        ValueError: a tensor has the wrong type or shape, or a label has no name.

    Example:
        >>> import torch
        >>> from pyro_kd.datasets import Images
        >>> images = Images(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0]), ("cat", "dog"))
        >>> len(images.where(images.labels == 0))
        2
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                "images must be uint8 of shape (n, channels, height, width), not "
                f"{_name(images.dtype)} of shape {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.ndim not in (1, 2) or len(labels) != len(images):
            raise ValueError(
                f"labels must be int64 of shape ({len(images)},) or ({len(images)}, attributes), one row per image, not "
                f"{_name(labels.dtype)} of shape {tuple(labels.shape)}"
            )
        if labels.ndim == 2 and labels.shape[1] != len(self.classes):
            raise ValueError(f"there are {labels.shape[1]} columns of attributes and {len(self.classes)} names for them")
        limit = len(self.classes) if labels.ndim == 1 else 2
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < limit:
            raise ValueError(f"labels must lie in 0 to {limit - 1}, and go from {int(labels.min())} to {int(labels.max())}")

    def __len__(self) -> int:
        return len(self.images)

    def floats(self) -> Tensor:
        """The images as float32 from 0 to 1, of the same shape, in four times the memory."""
        return self.images.to(torch.float32).div_(255)

    def subset(self, indices: Tensor) -> "Images":
        """The images at ``indices``, int64 of shape (m,), in that order."""
        return Images(self.images[indices], self.labels[indices], self.classes)

    def where(self, mask: Tensor) -> "Images":
        """The images where ``mask``, bool of shape (n,), is true.

        Raises:
            ValueError: the mask has a different type or shape.
        """
        if mask.dtype != torch.bool or mask.shape != (len(self),):
            raise ValueError(f"mask must be bool of shape ({len(self)},), not {_name(mask.dtype)} of {tuple(mask.shape)}")
        return self.subset(mask.nonzero().squeeze(-1))

    def split(self, held_out: int, seed: int) -> tuple["Images", "Images"]:
        """Split into two disjoint random parts, the second with ``held_out`` images.

        Raises:
            ValueError: there are fewer images.
        """
        if not 0 <= held_out <= len(self):
            raise ValueError(f"held_out must lie in 0 to {len(self)}, the number of images, and is {held_out}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(order[held_out:]), self.subset(order[:held_out])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
