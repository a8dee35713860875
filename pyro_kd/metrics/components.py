r"""Projection on principal components: a feature map for :func:`pyro_kd.metrics.fid` if no trained network fits.

Fit it once, on a reference sample (held-out data), and use the same map for every model that is compared.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_kd.metrics.samples import rows

__all__ = ["PrincipalComponents"]


@dataclass(frozen=True, slots=True, eq=False)
class PrincipalComponents:
    r"""Projection :math:`x \mapsto (x - m) V` on the leading principal components of a reference sample.

    Cost: O(k d) per value; see :meth:`of` for the fit.

    Attributes:
        mean: mean m of the flattened reference sample, shape ``(d,)``, float64.
        directions: orthonormal columns V, the component of largest variance first, shape ``(d, k)``, float64.
        variances: variance of the reference sample along each direction, shape ``(k,)``, float64.

    Example:
        >>> import torch
        >>> from pyro_kd.metrics import PrincipalComponents, fid
        >>> _ = torch.manual_seed(0)
        >>> reference = torch.randn(500, 8, 8)
        >>> features = PrincipalComponents.of(reference, 3)
        >>> features(reference).shape
        torch.Size([500, 3])
        >>> fid(reference, reference, features)
        0.0
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor

    @classmethod
    def of(cls, x: Tensor, num_components: int) -> "PrincipalComponents":
        """Fit on a sample, by its singular value decomposition.

        Cost: O(n d min(n, d)) time, O(n d) memory.

        Args:
            x: reference sample, shape ``(n, ...)``, n >= 2, with d numbers per value.
            num_components: k, from 1 to min(n - 1, d), the most that n values span.

        Raises:
            ValueError: the sample is too small or not finite, or k is out of range.
        """
        flat = rows(x, "x", minimum=2)
        most = min(flat.shape[0] - 1, flat.shape[1])
        if not 1 <= num_components <= most:
            raise ValueError(
                f"num_components must be from 1 to {most} for {flat.shape[0]} values of {flat.shape[1]} numbers, "
                f"not {num_components}"
            )
        mean = flat.mean(0)
        _, singular, directions = torch.linalg.svd(flat - mean, full_matrices=False)
        variances = singular[:num_components].square() / (len(flat) - 1)
        return cls(mean, directions[:num_components].T.contiguous(), variances)

    def __call__(self, x: Tensor) -> Tensor:
        """The components of each value.

        Args:
            x: values of shape ``(n, ...)``, with as many entries each as those of the reference sample, on any device.

        Returns:
            float64 tensor of shape ``(n, k)`` on the device of ``x``.

        Raises:
            ValueError: the values have a different number of entries than those of the reference sample.
        """
        flat = rows(x, "x")
        if flat.shape[1] != len(self.mean):
            raise ValueError(
                f"values of shape {tuple(x.shape[1:])} have {flat.shape[1]} numbers, but the components were fitted on "
                f"{len(self.mean)}"
            )
        return (flat - self.mean.to(flat.device)) @ self.directions.to(flat.device)
