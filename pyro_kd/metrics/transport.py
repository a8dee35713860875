r"""Earth mover's distance between two samples: the least mean distance by which one can be moved onto the other."""

from typing import Any

import torch
from torch import Tensor

from pyro_kd.metrics.samples import two_rows

__all__ = ["emd"]


def emd(x: Tensor, y: Tensor) -> float:
    r"""1-Wasserstein distance between two samples, with the Euclidean distance between values.

    .. math:: \min_\pi \frac1n \sum_i \|x_i - y_{\pi(i)}\|

    over permutations :math:`\pi`, exactly. The distance between two samples of the same law is positive, and falls only as
    :math:`n^{-1/d}`, so compare values at the same n.

    Cost: O(n^2) memory, O(n^3) time at worst: about a second for n = 2000, on the CPU. For one-dimensional samples O(n
    log n) time.

    Args:
        x: first sample, shape ``(n, ...)``.
        y: second sample of the same size. Samples with one number per value may differ in size.

    Returns:
        The mean distance, in the units of the data.

    Raises:
        ValueError: the sizes, shapes or devices differ, or a value is not finite.
        ModuleNotFoundError: scipy is not installed.

    References:
        Rubner, Tomasi and Guibas, The Earth Mover's Distance as a Metric for Image Retrieval, IJCV 40, 2000. Assignment:
        Crouse, On Implementing 2D Rectangular Assignment Algorithms, IEEE Trans. Aerospace and Electronic Systems 52, 2016.

    Example:
        >>> import torch
        >>> from pyro_kd.metrics import emd
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> emd(x, x.flip(0) + torch.tensor([3.0, 4.0]))
        5.0
    """
    first, second = two_rows(x, y, minimum=1)
    if first.shape[1] == 1:
        return float(_scipy().stats.wasserstein_distance(first[:, 0].cpu().numpy(), second[:, 0].cpu().numpy()))
    if len(first) != len(second):
        raise ValueError(
            f"values of {first.shape[1]} numbers need samples of equal size, not {len(first)} and {len(second)}; use the first "
            f"{min(len(first), len(second))} of each"
        )
    # cdist must not use products: those of large numbers would lose digits of small distances.
    cost = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy()
    row, column = _scipy().optimize.linear_sum_assignment(cost)
    return float(cost[row, column].mean())


def _scipy() -> Any:
    try:
        import scipy.optimize
        import scipy.stats
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("emd needs scipy: pip install scipy, or pyro-kd[metrics]") from error
    return scipy
