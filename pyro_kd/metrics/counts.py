r"""KL divergence between two samples of a discrete or binned variable, from counts.

With counts :math:`X_i` of n and :math:`Y_i` of m over the K cells that either sample occupies, :math:`K_x` of them by x,

.. math:: \widehat{KL} = \sum_i \frac{X_i}{n} \log \frac{X_i / n}{(Y_i + 1/2) / m} - \frac{K_x - 1}{2n} + \frac{1}{2m}

Half a count added to each :math:`Y_i` keeps the logarithm finite, and makes the expectation of :math:`\log (Y_i +
1/2)` right to first order. The other two terms are Miller and Madow's correction of the entropy of x, and what is left of
the same correction for y. If every cell of p expects several counts, the bias is of second order. The estimate may be below zero
if the laws are equal. A cell of x without counts of y adds about :math:`\log m` times its share: if q lacks a part of p's support,
the divergence is infinite, but the estimate is finite and grows with m.
"""

import math

import torch
from torch import Tensor

from pyro_kd.metrics.samples import two_rows
from pyro_kd.utils.estimate import Estimate

__all__ = ["count_kl", "histogram_kl"]


def count_kl(x: Tensor, y: Tensor) -> Estimate:
    r"""KL(p || q) of integer-valued samples x ~ p and y ~ q, from the counts of each value.

    For the formula and its bias, see :mod:`pyro_kd.metrics.counts`. If values have several numbers, each distinct row is one value.

    Cost: O((n + m) log(n + m)).

    Args:
        x: sample of p, shape ``(n, ...)``, of integers in any dtype, n >= 2.
        y: sample of q, shape ``(m, ...)``, m >= 2.

    Returns:
        The estimate in nats; its standard error by the delta method; the number of values n + m.

    Raises:
        ValueError: a value is not a finite integer, a sample is too small, or shapes or devices differ.

    References:
        Miller, Note on the Bias of Information Estimates, 1955. Paninski, Estimation of Entropy and Mutual Information,
        Neural Computation 15, 2003.

    Example:
        >>> import torch
        >>> from pyro_kd.metrics import count_kl
        >>> x, y = torch.tensor([0, 1]).repeat(5000), torch.tensor([0, 1, 1, 1]).repeat(2500)
        >>> round(count_kl(x, y).mean, 3)  # log 2 - log(3) / 2
        0.144
    """
    first, second = two_rows(x, y)
    for name, sample in (("x", x), ("y", y)):
        if not sample.is_floating_point() and sample.dtype is torch.int64 and bool((sample.abs() > 2**53).any()):
            raise ValueError(
                f"{name} holds integers beyond 2**53, which float64 does not tell apart: subtract a common offset"
            )
    joint = torch.cat([first, second])
    if not bool((joint == joint.round()).all()):
        raise ValueError("the samples hold values that are not integers; use histogram_kl or density_ratio_kl")
    values, cell = torch.unique(joint, dim=0, return_inverse=True)
    return _kl(cell[: len(first)], cell[len(first) :], len(values))


def histogram_kl(x: Tensor, y: Tensor, bins: int = 100, range: tuple[float, float] | None = None) -> Estimate:
    r"""KL(p || q) between one-dimensional samples x ~ p and y ~ q, cut into shared bins of equal width.

    This estimates the divergence between the binned laws, which is at most that between the laws themselves, and tends to it as
    the width tends to 0. For the formula and its bias, see :mod:`pyro_kd.metrics.counts`. Each bin that p reaches needs several
    values.

    Cost: O((n + m) log(n + m)).

    Args:
        x: sample of p, shape ``(n,)`` or ``(n, 1)``, n >= 2.
        y: sample of q, shape ``(m,)`` or ``(m, 1)``, m >= 2.
        bins: number of bins.
        range: lower and upper end of the bins. Values outside count in the outermost bins. Default: the smallest and the
            largest value of both samples. Fix it to compare values between runs.

    Returns:
        The estimate in nats; its standard error by the delta method; the number of values n + m.

    Raises:
        ValueError: the samples are not one-dimensional, too small or not finite, or ``bins`` or ``range`` are not valid.

    Example:
        >>> import torch
        >>> from pyro_kd.metrics import histogram_kl
        >>> _ = torch.manual_seed(0)
        >>> estimate = histogram_kl(torch.randn(50_000) + 1, torch.randn(50_000))  # KL = 1/2
        >>> abs(estimate.mean - 0.5) < 5 * estimate.standard_error
        True
    """
    first, second = two_rows(x, y)
    if first.shape[1] != 1:
        raise ValueError(
            f"a histogram needs one number per value, shape (n,) or (n, 1), not {tuple(x.shape)}; use density_ratio_kl"
        )
    if not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins must be a whole number of at least 1, not {bins!r}")
    joint = torch.cat([first, second])[:, 0]
    low, high = (float(joint.min()), float(joint.max())) if range is None else range
    if not (low < high or (low == high and range is None)) or not math.isfinite(high - low):
        raise ValueError(f"range must be (lower, upper), finite, with lower < upper, not {range}")
    width = (high - low) / bins or 1.0
    cell = ((joint - low) / width).floor().clamp(0, bins - 1).long()
    return _kl(cell[: len(first)], cell[len(first) :], bins)


def _kl(first: Tensor, second: Tensor, cells: int) -> Estimate:
    n, m = len(first), len(second)
    x = torch.bincount(first, minlength=cells).double()
    y = torch.bincount(second, minlength=cells).double()
    p, q = x / n, y / m
    reached = x > 0
    log_ratio = torch.where(reached, (p.clamp(min=1 / n) * m / (y + 0.5)).log(), 0.0)
    ratio = p * m / (y + 0.5)
    plain = (p * log_ratio).sum()
    mean = plain - (reached.sum() - 1) / (2 * n) + 1 / (2 * m)
    variance = (p * (log_ratio - plain).square()).sum() / n + (q * (ratio - (q * ratio).sum()).square()).sum() / m
    return Estimate(float(mean), float(variance.sqrt()), n + m)
