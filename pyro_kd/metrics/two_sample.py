r"""Distances between two samples: the kernel mean discrepancy and the nearest-neighbour test.

Each takes two tensors whose first dimension counts the samples, of shapes ``(n, ...)`` and ``(m, ...)``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_kd.metrics.kernels import gaussian
from pyro_kd.metrics.samples import two_rows

__all__ = ["mmd", "nearest_neighbour_accuracy"]

_CHUNK = 1 << 24  # distances held at once: 128 MiB
_EXACT = "donot_use_mm_for_euclid_dist"  # no matrix products, which round to the digits of the largest rows


def mmd(x: Tensor, y: Tensor, bandwidth: float | None = None, kernel: Callable[[Tensor, float], Tensor] = gaussian) -> float:
    r"""Unbiased estimate of the squared maximum mean discrepancy.

    .. math:: MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

    Zero in expectation if both samples have the same law, and so sometimes negative. Cost: O((n + m)^2 d) time, O((n +
    m)^2) memory.

    Args:
        x: first sample, shape ``(n, ...)``, n >= 2.
        y: second sample, shape ``(m, ...)``, m >= 2.
        bandwidth: h, in the units of the data. Default: the median distance within the joint sample. The kernel then
            depends on the sample; fix h to compare values, and for an exactly unbiased estimate.
        kernel: function of the squared distances, of any shape, and the bandwidth: :func:`~pyro_kd.metrics.gaussian`,
            :func:`~pyro_kd.metrics.laplacian`, :func:`~pyro_kd.metrics.rational_quadratic`, or any other positive definite one.

    Raises:
        ValueError: a sample is too small or not finite, shapes or devices differ, or the bandwidth is not positive.

    References:
        Gretton, Borgwardt, Rasch, Schölkopf and Smola, A Kernel Two-Sample Test, JMLR 13, 2012, Eq. 3.

    Example:
        >>> import torch
        >>> from pyro_kd.metrics import laplacian, mmd
        >>> x, y = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
        >>> round(mmd(x, y, bandwidth=1.0, kernel=laplacian), 4)  # 2 - 2 exp(-1)
        1.2642
    """
    x, y = two_rows(x, y)
    joint = torch.cat([x, y])
    joint = joint - joint.mean(0)  # a common offset would cost digits of the distances
    squared = torch.cdist(joint, joint).square().fill_diagonal_(0)
    width = _median(squared) if bandwidth is None else bandwidth
    rounding = 1e-15 * float(joint.square().sum(1).max())  # of matrix products, large next to far outliers
    if rounding > 1e-9 * width**2:
        squared = torch.cdist(joint, joint, compute_mode=_EXACT).square()
        width = _median(squared) if bandwidth is None else bandwidth
    if width == 0 and bandwidth is None:
        raise ValueError("bandwidth must be positive, but half of the distances are zero; pass bandwidth=h")
    if not 0 < width < float("inf"):
        raise ValueError(f"bandwidth must be positive and finite, not {width}")
    values = kernel(squared, width)
    n, m = len(x), len(y)
    within_x = (values[:n, :n].sum() - values.diagonal()[:n].sum()) / (n * (n - 1))
    within_y = (values[n:, n:].sum() - values.diagonal()[n:].sum()) / (m * (m - 1))
    return float(within_x + within_y - 2 * values[:n, n:].mean())


def _median(squared: Tensor) -> float:
    """The median distance between different rows."""
    upper = torch.triu_indices(len(squared), len(squared), 1, device=squared.device)
    return float(squared[upper[0], upper[1]].median().sqrt())


def nearest_neighbour_accuracy(x: Tensor, y: Tensor) -> float:
    """Leave-one-out accuracy of a 1-nearest-neighbour classifier that tells the two samples apart.

    One half is best: the samples cannot be told apart. 1 means that they do not overlap. Below one half, one sample
    repeats points of the other. If several values are nearest, as among discrete values or pixels, the fraction of them
    with the right label counts. This is the mean over random choices, whatever the order of the samples.

    Cost: O((n + m)^2 d) time, O((n + m) d) memory.

    Args:
        x: first sample, shape ``(n, ...)``, n >= 2.
        y: second sample of the same size.

    Raises:
        ValueError: the sizes, shapes or devices differ, a sample is too small, or a value is not finite.

    References:
        Lopez-Paz and Oquab, Revisiting Classifier Two-Sample Tests, ICLR 2017.

    Example:
        >>> import torch
        >>> from pyro_kd.metrics import nearest_neighbour_accuracy
        >>> x = torch.tensor([0.0, 1.0])
        >>> nearest_neighbour_accuracy(x, x + 10), nearest_neighbour_accuracy(x, x)
        (1.0, 0.0)
    """
    x, y = two_rows(x, y)
    if len(x) != len(y):
        raise ValueError(f"the two samples must have equal size for 1/2 to be best, not {len(x)} and {len(y)}")
    joint = torch.cat([x, y])
    label = torch.arange(len(joint), device=joint.device) < len(x)
    right = joint.new_zeros(())
    for block in torch.arange(len(joint), device=joint.device).split(max(1, _CHUNK // len(joint))):
        distance = torch.cdist(joint[block], joint, compute_mode=_EXACT)  # rounding would break ties
        distance[torch.arange(len(block), device=block.device), block] = torch.inf
        nearest = distance == distance.min(1, keepdim=True).values
        same = nearest & (label[block].unsqueeze(1) == label)
        right += (same.sum(1) / nearest.sum(1).double()).sum()
    return float(right / len(joint))
