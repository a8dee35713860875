"""The noise that programs share: laws without parameters, and draws from them.

In the semi-auxiliary form of a directed model (Chen et al. 2023, section 3.1) the noise has a fixed law, so that one draw of
it serves two programs with different parameters. Tensors only; no sites, no distributions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

__all__ = ["Draw", "Kind"]


class Kind(Enum):
    """The parameter-free laws of noise."""

    NORMAL = "standard normal"
    UNIFORM = "uniform on [0, 1)"
    EXPONENTIAL = "standard exponential"
    CAUCHY = "standard Cauchy"
    PERMUTATION = "uniform permutation"

    def sample(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw a tensor of this law."""
        if self is Kind.PERMUTATION:
            return torch.randperm(shape[0], dtype=dtype, device=device, generator=generator)
        if self is Kind.UNIFORM:
            return torch.rand(shape, dtype=dtype, device=device, generator=generator)
        empty = torch.empty(shape, dtype=dtype, device=device)
        if self is Kind.NORMAL:
            return empty.normal_(generator=generator)
        if self is Kind.EXPONENTIAL:
            return empty.exponential_(generator=generator)
        return empty.cauchy_(generator=generator)


@dataclass(frozen=True, slots=True)
class Draw:
    """One raw random draw: noise of a fixed law.

    Attributes:
        kind: the law.
        noise: the tensor drawn from it.
        op: the torch operation that asked for it, for error messages.
    """

    kind: Kind
    noise: Tensor
    op: str

    def describe(self) -> str:
        """Law, shape and purpose, for error messages."""
        return f"{self.kind.value} noise of shape {tuple(self.noise.shape)} (for {self.op})"
