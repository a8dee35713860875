"""Operations of torch as plain operations that ONNX has, and that are as accurate.

The converter of torch writes a logarithm of a sigmoid for some of them, which is minus infinity where float32 rounds the sigmoid to
0, and a logarithm of a sum of exponentials for others, which is infinity where one of them is. For the inverse functions of sine,
cosine and tangent ONNX Runtime has float32 alone, and torch's converter has no products. Knows tensors.
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


def _angle(rough: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """The angle of this sine and cosine, in float64, from one in float32: the sine of their difference is exact."""
    gap = sine * rough.cos() - cosine * rough.sin()
    return rough + gap + gap**3 / 6


def _acos(x: Tensor) -> Any:
    if x.dtype != torch.float64:
        return NotImplemented  # stays as it is
    sine, cosine = ((1 - x) / 2).sqrt(), ((1 + x) / 2).sqrt()  # of half of the angle
    return 2 * _angle(cosine.float().clamp(max=1).acos().double(), sine, cosine)


def _asin(x: Tensor) -> Any:
    if x.dtype != torch.float64:
        return NotImplemented
    return _angle(x.float().asin().double(), x, ((1 - x) * (1 + x)).sqrt())


def _atan(x: Tensor) -> Any:
    if x.dtype != torch.float64:
        return NotImplemented
    scale = x.abs().clamp(min=1)  # so that no square is infinite
    sine, cosine = x / scale, 1 / scale
    length = (sine.square() + cosine.square()).sqrt()
    return _angle(x.float().atan().double(), sine / length, cosine / length)


def _prod(x: Tensor, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(x.shape[dim], int) or x.shape[dim] == 0:
        return NotImplemented
    x = x if dtype is None else x.to(dtype)
    while (size := x.shape[dim]) > 1:
        pairs = x.narrow(dim, 0, size // 2) * x.narrow(dim, size // 2, size // 2)
        x = torch.cat([pairs, x.narrow(dim, size - 1, 1)], dim) if size % 2 else pairs
    return x if keepdim else x.squeeze(dim)


def _cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    x = x if dtype is None else x.to(dtype)
    size, step = x.shape[dim] if x.dim() else 1, 1
    if not isinstance(size, int):
        return NotImplemented
    while step < size:  # each entry times the one that lies ``step`` before it
        before = torch.cat([torch.ones_like(x.narrow(dim, 0, step)), x.narrow(dim, 0, size - step)], dim)
        x, step = x * before, 2 * step
    return x


STABLE: Mapping[Any, Callable[..., Any]] = {
    aten.binary_cross_entropy_with_logits.default: _cross_entropy,
    aten.log_sigmoid.default: _log_sigmoid,
    aten.log_sigmoid_forward.default: lambda x: (_log_sigmoid(x), torch.zeros_like(x)),
    aten.logaddexp.default: _logaddexp,
    aten.softplus.default: _softplus,
    aten.acos.default: _acos,
    aten.asin.default: _asin,
    aten.atan.default: _atan,
    aten.cumprod.default: _cumprod,
    aten.prod.dim_int: _prod,
}
"""By operation, a function of the same arguments."""
