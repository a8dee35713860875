"""Handwriting and drawings as sequences of pen movements, concatenated in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_kd.datasets.standardise import Standardisation

__all__ = ["Strokes"]


@dataclass(frozen=True, slots=True, eq=False)
class Strokes:
    """Drawings in stroke-3 form: each point has the movement from the point before, and whether the pen is lifted after it.

    Attributes:
        points: the points of all drawings, concatenated, float32, shape (total points, 3): dx and dy in the data's units, and
            pen_up, which is 1 if the pen is lifted after the point, else 0.
        lengths: number of points of each drawing, int64, at least 1, shape (n,).

    Raises:
        ValueError: a tensor has the wrong type, shape or values.

    References:
        Ha and Eck, A neural representation of sketch drawings, 2017, arXiv:1704.03477.

    Example:
        >>> import torch
        >>> from pyro_kd.datasets import Strokes
        >>> drawings = Strokes(torch.tensor([[0.0, 0, 0], [1, 2, 1], [0, 0, 1]]), torch.tensor([2, 1]))
        >>> values, mask = drawings.padded()
        >>> values.shape, mask.tolist()
        (torch.Size([2, 2, 3]), [[True, True], [True, False]])
    """

    points: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        points, lengths = self.points, self.lengths
        if points.dtype != torch.float32 or points.ndim != 2 or points.shape[1] != 3:
            raise ValueError(
                "points must be float32 of shape (total points, 3), not "
                f"{str(points.dtype).removeprefix('torch.')} of shape {tuple(points.shape)}"
            )
        if lengths.dtype != torch.int64 or lengths.ndim != 1:
            raise ValueError(
                "lengths must be int64 of shape (n,), not "
                f"{str(lengths.dtype).removeprefix('torch.')} of shape {tuple(lengths.shape)}"
            )
        if lengths.numel() and int(lengths.min()) < 1:
            raise ValueError(f"a drawing has {int(lengths.min())} points, but needs at least 1")
        if lengths.numel() and max(int(lengths.max()), len(lengths)) > len(points):  # before the sum, which would wrap
            raise ValueError(f"{len(lengths)} drawings of up to {int(lengths.max())} points have {len(points)} points")
        if int(lengths.sum()) != len(points):
            raise ValueError(f"the lengths sum to {int(lengths.sum())}, and there are {len(points)} points")
        if not points.isfinite().all():
            raise ValueError("a point is NaN or infinite")
        pen = points[:, 2]
        if not ((pen == 0) | (pen == 1)).all():
            raise ValueError(f"pen_up, the third column, must be 0 or 1, and goes from {pen.min():g} to {pen.max():g}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        """The points of one drawing, shape (length, 3)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"drawing {index} of {len(self)}")
        start = int(self._starts()[index])
        return self.points[start : start + int(self.lengths[index])]

    def padded(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """All drawings side by side.

        Args:
            length: number T of points; longer drawings are cut. Default: that of the longest drawing.

        Returns:
            Values of shape (n, T, 3), zero beyond the end of a drawing, and the mask of shape (n, T) that is true up to there.

        Raises:
            ValueError: ``length`` is negative.
        """
        if length is None:
            length = int(self.lengths.max()) if len(self) else 0
        if length < 0:
            raise ValueError(f"length must be at least 0, not {length}")
        mask = torch.arange(length, device=self.lengths.device) < self.lengths.unsqueeze(-1)
        within = torch.arange(len(self.points), device=self.lengths.device) - self._starts().repeat_interleave(self.lengths)
        values = self.points.new_zeros(len(self), length, 3)
        values[mask] = self.points[within < length]
        return values, mask

    def standardised(self, mean: Tensor | None = None, std: Tensor | None = None) -> tuple["Strokes", Standardisation]:
        """The drawings with movements of mean 0 and standard deviation 1. The pen is not changed.

        Args:
            mean: of (dx, dy), shape (2,), in the data's units. Default: that of these drawings.
            std: likewise. Give both or neither.

        Returns:
            The drawings, and the map of (dx, dy), which converts other drawings and converts back to the data's units.

        Raises:
            ValueError: only one is given, their shapes are wrong, or a column does not vary.
        """
        if (mean is None) != (std is None):
            raise ValueError("give mean and std, or neither")
        scale = Standardisation.of(self.points[:, :2]) if mean is None or std is None else Standardisation(mean, std)
        if scale.mean.shape != (2,) or scale.std.shape != (2,):
            raise ValueError(f"mean and std must have shape (2,), not {tuple(scale.mean.shape)}, {tuple(scale.std.shape)}")
        if not (scale.std > 0).all():
            raise ValueError(f"std must be positive, and is {scale.std.tolist()}")
        moved = scale(self.points[:, :2]).to(torch.float32)
        return Strokes(torch.cat([moved, self.points[:, 2:]], -1), self.lengths), scale

    def subset(self, indices: Tensor) -> "Strokes":
        """The drawings at ``indices``, int64 of shape (m,), in that order."""
        lengths = self.lengths[indices]
        shift = self._starts()[indices] - (lengths.cumsum(0) - lengths)
        return Strokes(
            self.points[torch.arange(int(lengths.sum()), device=lengths.device) + shift.repeat_interleave(lengths)], lengths
        )

    def where(self, mask: Tensor) -> "Strokes":
        """The drawings where ``mask``, bool of shape (n,), is true.

        Raises:
            ValueError: the mask has a different type or shape.
        """
        if mask.dtype != torch.bool or mask.shape != (len(self),):
            raise ValueError(f"mask must be bool of shape ({len(self)},), not {mask.dtype} of shape {tuple(mask.shape)}")
        return self.subset(mask.nonzero().squeeze(-1))

    def split(self, held_out: int, seed: int) -> tuple["Strokes", "Strokes"]:
        """Split into two disjoint random parts, the second with ``held_out`` drawings.

        Raises:
            ValueError: there are fewer drawings.
        """
        if not 0 <= held_out <= len(self):
            raise ValueError(f"held_out must lie in 0 to {len(self)}, the number of drawings, and is {held_out}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(order[held_out:]), self.subset(order[:held_out])

    def _starts(self) -> Tensor:
        return self.lengths.cumsum(0) - self.lengths
