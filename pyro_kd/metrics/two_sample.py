r"""Distances between two samples: kernel mean discrepancy and the nearest-neighbour test.

Each takes two tensors whose first dimension counts the samples, of shapes ``(n, ...)`` and ``(m, ...)``. Cost: O((n +
m)^2) distances in memory.
"""

import torch
from torch import Tensor

__all__ = ["mmd", "nearest_neighbour_accuracy"]


def mmd(x: Tensor, y: Tensor, bandwidth: float | None = None) -> float:
    r"""Unbiased estimate of the squared maximum mean discrepancy with a Gaussian kernel.

    .. math:: MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), \quad k(a, b) = \exp(-\|a - b\|^2 / 2 h^2)

    Zero in expectation where both samples have one law, and so sometimes negative.

    Args:
        x: first sample, shape ``(n, ...)``, n >= 2.
        y: second sample, shape ``(m, ...)``, m >= 2.
        bandwidth: h, in the units of the data; default: the median distance within the joint sample.

    References:
        Gretton, Borgwardt, Rasch, Schölkopf and Smola, A Kernel Two-Sample Test, JMLR 13, 2012, Eq. 3.
    """
    x, y = _rows(x, y)
    squared = torch.cdist(torch.cat([x, y]), torch.cat([x, y])).square()
    if bandwidth is None:
        upper = torch.triu_indices(len(squared), len(squared), 1)
        bandwidth = float(squared[upper[0], upper[1]].median().sqrt())
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, not {bandwidth}: are all points of the two samples equal?")
    kernel = (-squared / (2 * bandwidth**2)).exp()
    n, m = len(x), len(y)
    within_x = (kernel[:n, :n].sum() - n) / (n * (n - 1))
    within_y = (kernel[n:, n:].sum() - m) / (m * (m - 1))
    return float(within_x + within_y - 2 * kernel[:n, n:].mean())


def nearest_neighbour_accuracy(x: Tensor, y: Tensor) -> float:
    """Leave-one-out accuracy of the 1-nearest-neighbour classifier that tells the two samples apart.

    One half is best: the samples cannot be told apart. 1 means that they do not overlap; below one half, one sample
    repeats points of the other.

    Args:
        x: first sample, shape ``(n, ...)``.
        y: second sample of the same size.

    References:
        Lopez-Paz and Oquab, Revisiting Classifier Two-Sample Tests, ICLR 2017.
    """
    x, y = _rows(x, y)
    if len(x) != len(y):
        raise ValueError(f"the two samples must be of one size for 1/2 to be best, not {len(x)} and {len(y)}")
    joint = torch.cat([x, y])
    distance = torch.cdist(joint, joint)
    distance.fill_diagonal_(torch.inf)
    label = torch.arange(len(joint), device=joint.device) < len(x)
    return float((label[distance.argmin(1)] == label).double().mean())


def _rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"the samples hold values of shape {tuple(x.shape[1:])} and {tuple(y.shape[1:])}; they must agree")
    if min(len(x), len(y)) < 2:
        raise ValueError("each sample needs at least two values")
    return x.detach().double().flatten(1), y.detach().double().flatten(1)
