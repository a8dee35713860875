"""The maps of Pyro's stable laws without branches on values, for graphs. Knows tensors only."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_kd.utils.pyro_internals import stable_laws, stable_reparam

__all__ = ["stable_laws_traceable"]

_laws: Any = stable_laws
_reparam: Any = stable_reparam


@contextmanager
def stable_laws_traceable() -> Iterator[None]:
    """Let Pyro's stable laws, and their reparametrisations, be functions without branches.

    Pyro interpolates around a stability of 1, where its formulas have a hole, if one element of the batch is close to it. Here each
    element decides for itself, which gives the same up to rounding.
    """
    draw, shift = _laws._standard_stable, _reparam._safe_shift
    _laws._standard_stable = _reparam._standard_stable = _standard_stable
    _reparam._safe_shift = _safe_shift
    try:
        yield
    finally:
        _laws._standard_stable = _reparam._standard_stable = draw
        _reparam._safe_shift = shift


def _standard_stable(alpha: Tensor, beta: Tensor, uniform: Tensor, exponential: Tensor, coords: str) -> Tensor:
    if coords == "S":
        value = _standard_stable(alpha, beta, uniform, exponential, "S0")
        return torch.where(alpha == 1, value, value + beta * (math.pi / 2 * alpha).tan())
    ends, weights = _around_the_hole(alpha, _laws.RADIUS)
    beta, uniform, exponential = (x.unsqueeze(-1) for x in (beta, uniform, exponential))
    values: Tensor = _laws._unsafe_standard_stable(ends, beta, uniform, exponential, coords=coords)
    return (values * weights).sum(-1)


def _safe_shift(alpha: Tensor, skew: Tensor, scale: Tensor, skew_abs: Tensor) -> Tensor:
    ends, weights = _around_the_hole(alpha, 0.005)
    shifts: Tensor = _reparam._unsafe_shift(ends, skew.unsqueeze(-1), skew_abs.unsqueeze(-1).pow(ends.reciprocal()))
    return (shifts * weights).sum(-1)


def _around_the_hole(alpha: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Two stabilities outside of the hole at 1, along a new last dimension, and their weights in the interpolation."""
    is_near = (alpha - 1).abs() <= radius
    ends = torch.stack([torch.where(is_near, 1 - radius, alpha), torch.where(is_near, 1 + radius, alpha)], -1)
    return ends, torch.where(is_near.unsqueeze(-1), 1 - (ends - alpha.unsqueeze(-1)).abs() / (2 * radius), 0.5)
