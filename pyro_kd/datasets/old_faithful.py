"""The Old Faithful geyser: 272 eruptions, their duration and the waiting time to the next."""

from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor

__all__ = ["OldFaithful", "old_faithful"]


@dataclass(frozen=True, slots=True)
class OldFaithful:
    """Eruptions of the Old Faithful geyser, Yellowstone National Park.

    Attributes:
        eruptions: duration of the eruption in minutes, shape (272,).
        waiting: waiting time to the next eruption in minutes, shape (272,).
    """

    eruptions: Tensor
    waiting: Tensor

    @property
    def rows(self) -> Tensor:
        """Both columns, shape (272, 2): eruptions, waiting."""
        return torch.stack([self.eruptions, self.waiting], -1)


def old_faithful() -> OldFaithful:
    """Load the 272 rows, as in R's package ``datasets`` (``faithful``).

    References:
        Azzalini and Bowman, A look at some data on the Old Faithful geyser, Applied Statistics 39, 1990, 357-365.

    Example:
        >>> from pyro_kd.datasets import old_faithful
        >>> old_faithful().rows.shape
        torch.Size([272, 2])
    """
    lines = files("pyro_kd.datasets").joinpath("old_faithful.csv").read_text(encoding="utf-8").splitlines()
    values = torch.tensor([[float(cell) for cell in line.split(",")] for line in lines[1:]])
    return OldFaithful(eruptions=values[:, 0], waiting=values[:, 1])
