r"""Fréchet distance between two Gaussians, and between the features of two samples: the FID.

Both come from factors :math:`C = A A^T` of the covariances, with :math:`\operatorname{tr} (C_1 C_2)^{1/2} = \|A_1^T
A_2\|_*`, the sum of singular values. No roots of eigenvalues of :math:`C_1 C_2` are needed, so singular covariances lose no digits.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module

from pyro_kd.metrics.samples import rows, two_rows

__all__ = ["fid", "frechet_distance"]

_ROUNDING = 1e-6  # relative to the largest entry: how far a covariance in float32 may be from symmetric and definite


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    r"""Squared Fréchet distance between two Gaussians, which is their squared 2-Wasserstein distance.

    .. math:: \|m_1 - m_2\|^2 + \operatorname{tr}(C_1 + C_2 - 2 (C_1 C_2)^{1/2})

    Cost: O(d^3) time, O(d^2) memory.

    Args:
        mean1, mean2: shape ``(d,)``.
        cov1, cov2: symmetric and positive semi-definite, possibly singular, shape ``(d, d)``.

    Returns:
        The squared distance, computed in float64.

    Raises:
        ValueError: the shapes do not agree, a number is not finite, or a matrix is not a covariance.

    References:
        Dowson and Landau, The Fréchet Distance between Multivariate Normal Distributions, J. Multivariate Analysis 12, 1982.

    Example:
        >>> import torch
        >>> from pyro_kd.metrics import frechet_distance
        >>> zero, eye = torch.zeros(2), torch.eye(2)
        >>> frechet_distance(zero, eye, zero + 3, 4 * eye)
        20.0
    """
    d = mean1.numel()
    if mean1.shape != (d,) or mean2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        shapes = ", ".join(str(tuple(t.shape)) for t in (mean1, cov1, mean2, cov2))
        raise ValueError(f"mean1, cov1, mean2, cov2 have shapes {shapes}; they must be (d,), (d, d), (d,), (d, d)")
    first, second = two_rows(mean1, mean2, minimum=1)
    return _squared_distance(first[:, 0], _factor(cov1, "cov1").T, second[:, 0], _factor(cov2, "cov2").T)


def fid(x: Tensor, y: Tensor, features: Callable[[Tensor], Tensor] | None = None, batch_size: int = 256) -> float:
    r"""Fréchet distance between two samples, by the means and covariances of their features.

    .. math:: \|m_x - m_y\|^2 + \operatorname{tr}(C_x + C_y - 2 (C_x C_y)^{1/2})

    With the features of an Inception network it is the Fréchet inception distance. Numbers with different features, or without
    features, cannot be compared with published ones. The estimate is biased upwards, strongly unless n is far above d, so compare
    only values at the same n and m.

    Cost: one pass of both samples through ``features``; then O((n + m) d^2 + d^3) time and O((n + m) d) memory, or
    O((n + m)^2 d) time if n and m are below d.

    Args:
        x: first sample, shape ``(n, ...)``, n >= 2.
        y: second sample, shape ``(m, ...)``, m >= 2.
        features: maps a batch ``(b, ...)`` to features ``(b, d)``, or to ``(b, ...)``, which are flattened. It gets the
            values in their own dtype and on their own device, without gradient. A module is evaluated in eval mode, and
            the mode of every submodule is restored. Default: the flattened values themselves.
        batch_size: number of values that ``features`` gets at once.

    Returns:
        The squared distance, computed in float64. Zero for equal samples, up to rounding.

    Raises:
        ValueError: a sample is too small or not finite, shapes or devices differ, or ``features`` does not return finite
            features of the same width for each value.

    References:
        Heusel, Ramsauer, Unterthiner, Nessler and Hochreiter, GANs Trained by a Two Time-Scale Update Rule Converge to a
        Local Nash Equilibrium, NeurIPS 2017. Bias: Chong and Forsyth, Effectively Unbiased FID and Inception Score, CVPR
        2020.

    Example:
        >>> import torch
        >>> from pyro_kd.metrics import fid
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> fid(x, 2 * x + 1)  # means 1 and 3, standard deviations sqrt(2) and 2 sqrt(2)
        6.0
        >>> fid(x, x, features=torch.nn.Linear(1, 4))
        0.0
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, not {batch_size}")
    if features is None:
        first, second = two_rows(x, y)
    else:
        two_rows(x[:2], y[:2])  # checks shapes and devices; the features are checked below
        with _evaluation(features):
            first = _features(features, x, "x", batch_size)
            second = _features(features, y, "y", batch_size)
        if first.shape[1] != second.shape[1]:
            raise ValueError(
                f"features has width {first.shape[1]} for x and {second.shape[1]} for y; the widths must be equal"
            )
    mean1, mean2 = first.mean(0), second.mean(0)
    return _squared_distance(mean1, _sample_factor(first - mean1), mean2, _sample_factor(second - mean2))


def _squared_distance(mean1: Tensor, factor1: Tensor, mean2: Tensor, factor2: Tensor) -> float:
    """From means of shape (d,) and factors of the covariances, of shapes (r, d) and (s, d), with factor^T factor = cov."""
    across = torch.linalg.svdvals(factor1 @ factor2.T).sum()
    distance = (mean1 - mean2).square().sum() + factor1.square().sum() + factor2.square().sum() - 2 * across
    return max(float(distance), 0.0)  # rounding may leave -1e-15


def _sample_factor(centred: Tensor) -> Tensor:
    """A factor of a sample's covariance, with at most as many rows as columns, by QR and so without squaring."""
    scaled = centred / math.sqrt(len(centred) - 1)
    return torch.linalg.qr(scaled, mode="r").R if scaled.shape[0] > scaled.shape[1] else scaled


def _factor(cov: Tensor, name: str) -> Tensor:
    """A factor A with A A^T = cov."""
    cov = rows(cov, name)
    scale = float(cov.abs().max())
    if float((cov - cov.T).abs().max()) > _ROUNDING * scale:
        raise ValueError(f"{name} is not symmetric; for (c + c.T) / 2 the distance is defined")
    eigenvalues, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    if float(eigenvalues[0]) < -_ROUNDING * scale * len(cov):
        raise ValueError(f"{name} has the negative eigenvalue {float(eigenvalues[0]):.3g}, so it is not a covariance")
    return vectors * eigenvalues.clamp(min=0).sqrt()


def _features(features: Callable[[Tensor], Tensor], x: Tensor, name: str, batch_size: int) -> Tensor:
    batches = []
    for batch in x.detach().split(batch_size):
        out = features(batch)
        if not isinstance(out, Tensor) or out.dim() == 0 or len(out) != len(batch):
            found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"features must map {len(batch)} values to {len(batch)} rows, shape (b, d); it returned {found}"
            )
        batches.append(rows(out, f"features({name})"))
    widths = {batch.shape[1] for batch in batches}
    if len(widths) > 1:
        raise ValueError(f"features has widths {sorted(widths)} for {name}; the widths must be equal")
    return torch.cat(batches)


@contextmanager
def _evaluation(features: object) -> Iterator[None]:
    """No gradients; a module in eval mode, and each submodule's own mode afterwards."""
    modes = {module: module.training for module in features.modules()} if isinstance(features, Module) else {}
    try:
        with torch.no_grad():
            if isinstance(features, Module):
                features.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
