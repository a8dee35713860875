"""The noise that programs share: laws without parameters, and draws from them.

In the semi-auxiliary form of a directed model (Chen et al. 2023, section 3.1) the noise has a fixed law, so that one draw of
it serves two programs with different parameters. Knows tensors; no sites, no distributions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

__all__ = ["Draw", "NoiseLaw", "convert"]


class NoiseLaw(Enum):
    """The parameter-free laws of noise."""

    NORMAL = "standard normal"
    UNIFORM = "uniform on (0, 1)"
    EXPONENTIAL = "standard exponential"
    CAUCHY = "standard Cauchy"
    PERMUTATION = "uniform permutation"

    def sample(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw a tensor of this law.

        Args:
            shape, dtype, device: of the tensor. A permutation takes the first number of the shape as its length.
            generator: torch's random generator; None for the global one.
        """
        if self is NoiseLaw.PERMUTATION:
            return torch.randperm(shape[0], dtype=dtype, device=device, generator=generator)
        if self is NoiseLaw.UNIFORM:
            # Half of the smallest positive value instead of 0, where quantile functions are infinite.
            return torch.rand(shape, dtype=dtype, device=device, generator=generator).clamp_(min=torch.finfo(dtype).eps / 4)
        empty = torch.empty(shape, dtype=dtype, device=device)
        if self is NoiseLaw.NORMAL:
            return empty.normal_(generator=generator)
        if self is NoiseLaw.EXPONENTIAL:
            return empty.exponential_(generator=generator)
        return empty.cauchy_(generator=generator)


def convert(noise: Tensor, source: NoiseLaw, target: NoiseLaw) -> Tensor | None:
    r"""Turn noise of one continuous law into noise of another, by the increasing map between them.

    .. math:: \epsilon' = F_{target}^{-1}(F_{source}(\epsilon))

    It is computed through the normal score, in float64 and from the nearer tail, so that neither tail loses digits. The increasing
    map is the optimal coupling of the two laws, so a Normal latent of the teacher can share its noise with a Laplace latent of the
    student.

    Args:
        noise: draws of the law ``source``, of any shape. The map works element by element.
        source, target: the laws.

    Returns:
        float64 tensor of the same shape; None if one of the laws is not continuous (a permutation).
    """
    if source is target:
        return noise
    if NoiseLaw.PERMUTATION in (source, target):
        return None
    x, ndtri, ndtr, log_ndtr = noise.double(), torch.special.ndtri, torch.special.ndtr, torch.special.log_ndtr
    if source is NoiseLaw.NORMAL:
        score = x
    elif source is NoiseLaw.UNIFORM:
        grid = 2.0**-25 if noise.dtype == torch.float32 else 2.0**-54
        score = ndtri(x.clamp(grid, 1 - max(grid, 2.0**-53)))
    elif source is NoiseLaw.EXPONENTIAL:
        score = torch.where(x > 0.5, -ndtri((-x).exp()), ndtri(-torch.expm1(-x)))
    else:
        score = -x.sign() * ndtri(torch.atan2(torch.ones_like(x), x.abs()) / math.pi)
    if target is NoiseLaw.NORMAL:
        return score
    if target is NoiseLaw.UNIFORM:
        return ndtr(score).clamp(max=1 - 2.0**-53)
    if target is NoiseLaw.EXPONENTIAL:
        return -log_ndtr(-score)
    return score.sign() / torch.tan(math.pi * ndtr(-score.abs()))


@dataclass(frozen=True, slots=True)
class Draw:
    """One raw random draw: noise of a fixed law.

    Attributes:
        law: the law.
        noise: the tensor drawn from it.
        op: the torch operation that asked for it, for error messages.
        where: file and line, if it was drawn outside of a sample site.
    """

    law: NoiseLaw
    noise: Tensor
    op: str
    where: str = ""

    def made(self, op: str, where: str) -> "Draw":
        """A copy that names this operation, and this file and line."""
        return replace(self, op=op, where=where)

    def describe(self) -> str:
        """Law, shape and purpose, for error messages."""
        return f"{self.law.value} noise of shape {tuple(self.noise.shape)} (for {self.op})"
