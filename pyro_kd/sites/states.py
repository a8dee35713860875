"""All values of one event of a discrete distribution, which may be a vector of independent variables. Knows distributions only."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent

from pyro_kd.errors import UnsupportedDivergenceError
from pyro_kd.noise.samplers import unwrapped
from pyro_kd.utils.advice import advice

__all__ = ["event_states", "num_states"]


def num_states(fn: Any, name: str) -> int:
    """The number of values of one event of a discrete distribution."""
    values, copies = _values(fn, name)
    return len(values) ** copies.numel()


def event_states(fn: Any, name: str) -> Tensor:
    """All values of one event of a discrete distribution, of shape ``(number of states, *event_shape)``.

    Raises:
        UnsupportedDivergenceError: the distribution of the site ``name`` has no finite support.
    """
    values, copies = _values(fn, name)
    if copies.numel() == 0:
        return values.new_empty(1, *copies, *values.shape[1:])
    grid = torch.cartesian_prod(*[torch.arange(len(values))] * copies.numel()) if copies else torch.arange(len(values))
    return values[grid.reshape(-1, *copies).to(values.device)]


def _values(fn: Any, name: str) -> tuple[Tensor, torch.Size]:
    """The values of one variable of an event, along the first dimension, and the shape of the variables of the event."""
    base, rank = fn, 0
    while isinstance(base, Independent):
        rank += base.reinterpreted_batch_ndims
        base = base.base_dist
    try:
        if not getattr(base, "has_enumerate_support", False):
            raise NotImplementedError
        values = base.enumerate_support(expand=False)
    except NotImplementedError:
        raise UnsupportedDivergenceError(
            f"latent site {name!r} is {type(unwrapped(fn)).__name__}, whose values cannot be enumerated. Use a discrete latent with "
            f"a finite support, or {advice().rather('MultiSampleKD, which draws the latents')}."
        ) from None
    copies = base.batch_shape[len(base.batch_shape) - rank :] if rank else torch.Size()
    return values.reshape(len(values), *base.event_shape), copies
