"""A mean with its standard error."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Estimate"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A Monte Carlo estimate.

    Attributes:
        mean: the estimate.
        standard_error: its standard error.
        num_samples: the number of independent samples.
    """

    mean: float
    standard_error: float
    num_samples: int

    @classmethod
    def of(cls, samples: Tensor) -> "Estimate":
        """The mean of independent values of shape ``(n,)``. With a single value, the standard error is NaN."""
        error = float(samples.std() / len(samples) ** 0.5) if len(samples) > 1 else float("nan")
        return cls(float(samples.mean()), error, len(samples))
