"""Standardisation that remembers how to go back to the data's units."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Standardisation"]


@dataclass(frozen=True, slots=True)
class Standardisation:
    """The affine map that gives each column of a data set mean 0 and standard deviation 1.

    Attributes:
        mean: shape (columns,), in the data's units.
        std: shape (columns,), in the data's units. 1 for a column that does not vary, which becomes 0.

    Example:
        >>> from pyro_kd.datasets import Standardisation, old_faithful
        >>> minutes = old_faithful().rows
        >>> scale = Standardisation.of(minutes)
        >>> bool(scale.restore(scale(minutes)).isclose(minutes).all())
        True
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Standardisation":
        """Fit to ``rows`` of shape (n, columns).

        Raises:
            TypeError: the rows are not of floating-point numbers.
            ValueError: there are fewer than two rows, or a column is not finite.
        """
        if not rows.is_floating_point():
            raise TypeError(f"the rows must be of floating-point numbers, not {rows.dtype}: pass rows.float()")
        if len(rows) < 2:
            raise ValueError(f"the rows vary from two on, and there is {len(rows)}")
        bad = (~rows.isfinite().all(0)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"column {bad[0]} of the rows has values that are NaN or infinite")
        mean, std = rows.mean(0), rows.std(0)
        varies = (rows != rows[0]).any(0)  # the mean of equal numbers may be rounded
        return cls(torch.where(varies, mean, rows[0]), torch.where(varies, std, torch.ones_like(std)))

    def __call__(self, rows: Tensor) -> Tensor:
        """Standardise ``rows`` of shape (n, columns)."""
        return (rows - self.mean) / self.std

    def restore(self, rows: Tensor) -> Tensor:
        """Back to the data's units."""
        return rows * self.std + self.mean
