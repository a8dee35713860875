"""Draws that floating point rounds to the border of their support, and what they were before they were rounded.

A relaxed category at a low temperature, or the tanh of a large number, is so close to the border that its distance from it is lost.
The log density there is infinite, NaN or that of a different value. So a draw from a density is moved to the nearest number inside,
and carries the input of its last transform (:func:`preimage`), from which :mod:`pyro_kd.divergences.log_densities` computes the
density to full accuracy. Tensors and distributions only.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributions import TransformedDistribution, constraints

from pyro_kd.noise.point_masses import Mass, mass_of, support_of

__all__ = [
    "clamped",
    "keep_inside",
    "log_height",
    "log_height_of",
    "log_of",
    "next_number",
    "preimage",
    "remembering",
    "share_at_border",
    "with_log",
    "with_log_height",
    "with_preimage",
]

_MARKS = ("_pyro_kd_preimage", "_pyro_kd_log", "_pyro_kd_height")


def preimage(value: Tensor) -> Tensor | None:
    """The input of the transform that made a draw; None if none did. It has the shape of the transform's domain."""
    return getattr(value, "_pyro_kd_preimage", None)


def with_preimage(value: Tensor, before: Tensor) -> Tensor:
    """The value, which now carries the input of the transform that made it."""
    value._pyro_kd_preimage = before  # type: ignore[attr-defined]
    return value


def log_of(value: Tensor) -> Tensor | None:
    """The logarithm of a positive draw before it was rounded, if its sampler has left it; of the shape of the draw."""
    return getattr(value, "_pyro_kd_log", None)


def with_log(value: Tensor, log: Tensor) -> Tensor:
    """The value, which now carries its logarithm."""
    value._pyro_kd_log = log  # type: ignore[attr-defined]
    return value


def log_height(value: Tensor) -> Tensor | None:
    r""":math:`\ln(-\ln x)` of a draw x in (0, 1) before it was rounded, if its sampler has left it; of the shape of the draw.

    It loses no digits near 0 and near 1.
    """
    return getattr(value, "_pyro_kd_height", None)


def with_log_height(value: Tensor, height: Tensor) -> Tensor:
    """The value, which now carries its log height, and its logarithm."""
    value._pyro_kd_height = height  # type: ignore[attr-defined]
    return with_log(value, -height.exp())


def log_height_of(log1m: Tensor) -> Tensor:
    r""":math:`\ln(-\ln x)` from :math:`\ln(1 - x)`."""
    is_near_1 = log1m < -10  # where -ln x is 1 - x to first order, whose logarithm is given
    near_0 = torch.where(is_near_1, -1.0, log1m)
    return torch.where(is_near_1, log1m + log1m.exp() / 2, (-torch.log1p(-near_0.exp())).log())


class _Remembering:
    """A transform whose results carry their inputs."""

    def __init__(self, transform: Any) -> None:
        self._transform = transform

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._transform(x)
        # The identity returns its input, which carries the input of the transform before it.
        return with_preimage(_with_marks_of(x, x.view_as(x)) if y is x else y, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transform, name)


def remembering(fn: Any) -> Any:
    """A distribution like ``fn`` whose draws carry their preimages; ``fn`` itself if it has no transforms."""
    base = getattr(fn, "__dict__", {}).get("base_dist")
    if base is None:
        return fn
    new_base, is_image = remembering(base), isinstance(fn, TransformedDistribution)
    if new_base is base and not is_image:
        return fn
    new = copy.copy(fn)
    new.__dict__["base_dist"] = new_base
    if is_image:
        new.__dict__["transforms"] = [_Remembering(transform) for transform in fn.transforms]
    return new


def keep_inside(value: Any, fn: Any) -> Any:
    """Move a draw from a density off the border of its support to the nearest number inside. Everything else is returned as it is."""
    if hasattr(value, "_unquantize"):
        return value
    ends = _ends(value, fn)
    if ends is None:
        return value
    if support_of(fn) is constraints.simplex:
        detached = value.detach().clamp(min=ends[0])
        moved = value + (detached / detached.sum(-1, keepdim=True) - value.detach())
    else:
        moved = clamped(value, *ends)
    return _with_marks_of(value, moved)


def _with_marks_of(value: Tensor, new: Tensor) -> Tensor:
    for name in _MARKS:
        if hasattr(value, name):
            setattr(new, name, getattr(value, name))
    return new


def share_at_border(value: Any, fn: Any) -> float:
    """The share of numbers in a draw from a density that are the last ones inside of its support, or have underflowed."""
    ends = _ends(value, fn)
    if ends is None or not value.numel():
        return 0.0
    (low, high), finfo = ends, torch.finfo(value.dtype)
    low = torch.where(low == finfo.tiny, 1e6 * low, low)  # a sampler may have computed with a clamped number
    high = torch.where(high == finfo.max, 1e-6 * high, high)
    return float(((value <= low) | (value >= high)).float().mean())


def _ends(value: Any, fn: Any) -> tuple[Tensor, Tensor] | None:
    """The least and the greatest number inside of the support of a density; None without a border or without a density."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    support = support_of(fn)
    low, high = (
        (0.0, 1.0)
        if support is constraints.simplex
        else (getattr(support, f"{end}_bound", None) for end in ("lower", "upper"))
    )
    if (low is None and high is None) or mass_of(fn) is not Mass.DENSITY:
        return None
    return _above(low, value), _below(high, value)


def clamped(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clamp a value without changing its derivative, as torch's Gamma does. All arguments broadcast with each other."""
    detached = value.detach()
    bound = torch.minimum(torch.maximum(detached, low), high)
    return torch.where(detached.isinf(), bound, value + (bound - detached))


def _above(bound: Any, value: Tensor) -> Tensor:
    """The least number above a lower bound."""
    finfo = torch.finfo(value.dtype)
    if bound is None:
        return value.new_tensor(-finfo.max)
    low = torch.as_tensor(bound, dtype=value.dtype, device=value.device).detach()
    return torch.where(low == 0, finfo.tiny, next_number(low, 1))


def _below(bound: Any, value: Tensor) -> Tensor:
    """The greatest number below an upper bound."""
    finfo = torch.finfo(value.dtype)
    if bound is None:
        return value.new_tensor(finfo.max)
    high = torch.as_tensor(bound, dtype=value.dtype, device=value.device).detach()
    return torch.where(high == 0, -finfo.tiny, next_number(high, -1))


def next_number(bound: Tensor, direction: int) -> Tensor:
    """The number next to a bound that is not 0, above it (direction 1) or below it (-1), of the same shape.

    Under ``torch.export`` it is one or two steps away, since exported graphs have no ``nextafter``.
    """
    if torch.compiler.is_exporting():
        finfo = torch.finfo(bound.dtype)
        finite = bound.clamp(-finfo.max, finfo.max)  # some elements may have no bound
        return finite + direction * finite.abs() * finfo.eps
    return torch.nextafter(bound, torch.full_like(bound, direction * torch.inf))
