"""Standardisation that remembers how to go back to the data's units."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Standardisation"]


@dataclass(frozen=True, slots=True)
class Standardisation:
    """The affine map that gives each column of a data set mean 0 and standard deviation 1.

    Attributes:
        mean: shape (columns,), in the data's units.
        std: shape (columns,), in the data's units.

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
        """Fit to ``rows`` of shape (n, columns)."""
        return cls(rows.mean(0), rows.std(0))

    def __call__(self, rows: Tensor) -> Tensor:
        """Standardise ``rows`` of shape (n, columns)."""
        return (rows - self.mean) / self.std

    def restore(self, rows: Tensor) -> Tensor:
        """Back to the data's units."""
        return rows * self.std + self.mean
