"""Operations of torch that stay accurate far out, as plain operations that do so too.

The converter of torch writes a logarithm of a sigmoid for some of them, which is minus infinity where float32 rounds the sigmoid to
0, and a logarithm of a sum of exponentials for others, which is infinity where one of them is. Knows tensors.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_kd.noise.special_functions import log1p

__all__ = ["STABLE"]

aten = torch.ops.aten


def _softplus_of_minus(size: Tensor) -> Tensor:
    """log(1 + exp(-x)) for x of at least 0, any shape."""
    return log1p((-size).exp())


def _logaddexp(one: Tensor, two: Tensor) -> Tensor:
    largest = torch.maximum(one, two)
    gap = torch.where(one == two, torch.zeros_like(largest), (one - two).abs())  # infinity minus infinity is no number
    return largest + _softplus_of_minus(gap)


def _log_sigmoid(x: Tensor) -> Tensor:
    return x.clamp(max=0) - _softplus_of_minus(x.abs())


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    scaled = x * beta
    return torch.where(scaled > threshold, x, (scaled.clamp(min=0) + _softplus_of_minus(scaled.abs())) / beta)


def _cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    positive = _log_sigmoid(x) if pos_weight is None else pos_weight * _log_sigmoid(x)
    loss = -target * positive - (1 - target) * _log_sigmoid(-x)
    loss = loss if weight is None else loss * weight
    return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()


STABLE: Mapping[Any, Callable[..., Any]] = {
    aten.binary_cross_entropy_with_logits.default: _cross_entropy,
    aten.log_sigmoid.default: _log_sigmoid,
    aten.log_sigmoid_forward.default: lambda x: (_log_sigmoid(x), torch.zeros_like(x)),
    aten.logaddexp.default: _logaddexp,
    aten.softplus.default: _softplus,
}
"""By operation, a function of the same arguments."""
