r"""Kernels for :func:`pyro_kd.metrics.mmd`: functions of the squared distance and the bandwidth.

Each is 1 at distance zero, positive definite in every dimension, and characteristic: the discrepancy is zero only for equal
laws. Any positive definite function with the same signature can take their place. Cost: one pass over the distances.
"""

from torch import Tensor

__all__ = ["gaussian", "laplacian", "rational_quadratic"]


def gaussian(squared_distance: Tensor, bandwidth: float) -> Tensor:
    r"""Gaussian kernel.

    .. math:: k(r^2, h) = \exp(-r^2 / 2 h^2)

    Args:
        squared_distance: :math:`r^2`, any shape.
        bandwidth: h > 0, in the units of r.

    Returns:
        Tensor of the same shape.

    Example:
        >>> import torch
        >>> from pyro_kd.metrics import gaussian
        >>> gaussian(torch.tensor([0.0, 2.0]), 1.0)
        tensor([1.0000, 0.3679])
    """
    return (-squared_distance / (2 * bandwidth**2)).exp()


def laplacian(squared_distance: Tensor, bandwidth: float) -> Tensor:
    r"""Laplacian kernel of the Euclidean distance; it weighs fine differences more than :func:`gaussian`.

    .. math:: k(r^2, h) = \exp(-r / h)

    Args:
        squared_distance: :math:`r^2`, any shape.
        bandwidth: h > 0, in the units of r.

    Returns:
        Tensor of the same shape.

    Example:
        >>> import torch
        >>> from pyro_kd.metrics import laplacian
        >>> laplacian(torch.tensor([0.0, 4.0]), 2.0)
        tensor([1.0000, 0.3679])
    """
    return (-squared_distance.sqrt() / bandwidth).exp()


def rational_quadratic(squared_distance: Tensor, bandwidth: float) -> Tensor:
    r"""Rational quadratic kernel: a mixture of Gaussian kernels of all widths, with heavy tails.

    .. math:: k(r^2, h) = (1 + r^2 / 2 h^2)^{-1}

    Args:
        squared_distance: :math:`r^2`, any shape.
        bandwidth: h > 0, in the units of r.

    Returns:
        Tensor of the same shape.

    References:
        Bińkowski, Sutherland, Arbel and Gretton, Demystifying MMD GANs, ICLR 2018, section 2.1, with alpha = 1.

    Example:
        >>> import torch
        >>> from pyro_kd.metrics import rational_quadratic
        >>> rational_quadratic(torch.tensor([0.0, 2.0]), 1.0)
        tensor([1.0000, 0.5000])
    """
    return 1 / (1 + squared_distance / (2 * bandwidth**2))
