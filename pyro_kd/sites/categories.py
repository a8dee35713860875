"""Two ways to write a category: as an index (Categorical) and as a one-hot vector (OneHotCategorical).

A site may have one coding in the teacher and the other in the student. They share noise all the same, and their distributions are
compared in the teacher's coding. Distributions and tensors only.
"""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_kd.noise.samplers import unwrapped

__all__ = ["num_categories", "recoded", "recoded_value"]


def recoded(fn: Any, like: Any) -> Any:
    """The distribution ``fn`` in the coding of ``like`` if both are over categories; else ``fn`` itself."""
    one_hot = _is_one_hot(fn)
    wants_one_hot = None if one_hot is None else _is_one_hot(like)
    if wants_one_hot is None or one_hot == wants_one_hot:
        return fn
    if isinstance(fn, dist.Independent):
        return dist.Independent(recoded(fn.base_dist, like), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return recoded(fn.base_dist, like).mask(fn._mask)
    return dist.OneHotCategorical(logits=fn.logits) if wants_one_hot else dist.Categorical(logits=fn.logits)


def recoded_value(value: Tensor, fn: Any, like: Any) -> Tensor:
    """A value of ``fn`` in the coding of ``like`` if both are over categories; else the value itself.

    Args:
        value: of shape ``fn.batch_shape + fn.event_shape``.
        fn, like: the distributions.

    Returns:
        Tensor of shape ``fn.batch_shape + like.event_shape``.
    """
    one_hot = _is_one_hot(fn)
    wants_one_hot = None if one_hot is None else _is_one_hot(like)
    if wants_one_hot is None or one_hot == wants_one_hot:
        return value
    if not wants_one_hot:
        return value.argmax(-1)
    return torch.nn.functional.one_hot(value.long(), unwrapped(like).event_shape[-1]).to(unwrapped(like).logits.dtype)


_OVER_CATEGORIES = (torch.distributions.OneHotCategorical, torch.distributions.Categorical)


def num_categories(fn: Any) -> int | None:
    """The number of categories of a distribution over categories; None for other distributions."""
    fn = unwrapped(fn)
    return int(fn.logits.shape[-1]) if isinstance(fn, _OVER_CATEGORIES) else None


def _is_one_hot(fn: Any) -> bool | None:
    """Whether a distribution over categories draws one-hot vectors; None for other distributions."""
    fn = unwrapped(fn)
    if isinstance(fn, torch.distributions.OneHotCategorical):
        return True
    return False if isinstance(fn, torch.distributions.Categorical) else None
