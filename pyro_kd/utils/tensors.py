"""Finding the tensors inside nested objects."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.distributions.distribution import Distribution as PyroDistribution
from torch import Tensor, nn

__all__ = ["READERS", "equal", "number_in", "tensors_in"]

READERS: list[Callable[[Tensor], float]] = []
"""What reads numbers while a run is captured (:mod:`pyro_kd.capture.decisions`): the last one does."""


def number_in(value: Tensor) -> float:
    """The number in a scalar tensor, where a dispatch mode hides the read from whoever captures the run."""
    return READERS[-1](value) if READERS else float(value)


def equal(mine: Any, yours: Any) -> bool:
    """Whether two values, numbers or tensors, are equal in every element."""
    if mine is yours or (type(mine) is float and mine == yours):
        return True
    if isinstance(mine, Tensor) and isinstance(yours, Tensor):
        return mine.shape == yours.shape and torch.equal(mine, yours)
    if mine is None or yours is None:
        return False
    return bool(torch.as_tensor(mine == yours).all())


def same_values(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal in every element, NaN at equal places included."""
    if torch.equal(one, two):
        return True
    is_nan = one.isnan()
    return bool(is_nan.any()) and torch.equal(is_nan, two.isnan()) and torch.equal(one[~is_nan], two[~is_nan])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers, modules, distributions and transforms."""
    stack, seen = [value], set[int]()
    while stack:
        item = stack.pop()
        if id(item) in seen:  # a transform and its inverse refer to each other
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
        elif isinstance(item, nn.Module):
            yield from item.parameters()
        elif isinstance(item, torch.distributions.Distribution | torch.distributions.Transform | PyroDistribution):
            stack.append(vars(item))
