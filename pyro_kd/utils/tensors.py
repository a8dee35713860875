"""Finding the tensors inside nested objects."""

from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions.distribution import Distribution as PyroDistribution
from torch import Tensor, nn

__all__ = ["same_values", "tensors_in"]


def same_values(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors of any shapes have the same shape and are equal in every element, where NaN equals NaN."""
    if torch.equal(one, two):
        return True
    is_nan = one.isnan()
    return bool(is_nan.any()) and torch.equal(is_nan, two.isnan()) and torch.equal(one[~is_nan], two[~is_nan])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors, of any shapes, in nested containers, modules, distributions and transforms."""
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
