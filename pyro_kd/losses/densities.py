"""The log density of a target at given values. If it has none, the error names the site and a remedy."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_kd.divergences.log_densities import log_density
from pyro_kd.errors import SupportMismatchError, UnsupportedDivergenceError
from pyro_kd.noise.samplers import unwrapped
from pyro_kd.sites.pairing import SitePair
from pyro_kd.utils.advice import advice

__all__ = ["log_density_at", "log_prob_of_many"]


def log_density_at(pair: SitePair, fn: Any, value: Tensor) -> Tensor:
    """The log density of one distribution of a pair, at the targets of many rows or of its own.

    Args:
        pair: the sites.
        fn: the teacher's or the student's distribution at the pair.
        value: values of shape ``(..., *batch_shape, *event_shape)``.

    Returns:
        Tensor of shape ``(..., *batch_shape)``, without scale and mask.

    Raises:
        SupportMismatchError: a value is outside of the distribution's support.
        UnsupportedDivergenceError: the distribution has no density at values that it has not drawn itself.
    """
    try:
        if value.dim() > len(fn.batch_shape) + len(fn.event_shape) and _bits(fn) is not None:
            return log_prob_of_many(fn, value)
        return log_density(fn, value, drawn_from=pair.p)
    except ValueError as error:  # torch's check of values
        raise SupportMismatchError(
            f"target {pair.name!r}: a draw of the teacher's {type(unwrapped(pair.p)).__name__} is outside the support of "
            f"{type(unwrapped(fn)).__name__} ({str(error).splitlines()[0].rstrip(':')}). Give both programs distributions "
            "over the same values at this site."
        ) from error
    except (NotImplementedError, KeyError) as error:  # KeyError: a flow without inverse
        raise UnsupportedDivergenceError(
            f"target {pair.name!r}: {type(unwrapped(fn)).__name__} has no density at values that were drawn under other latents "
            f"({type(error).__name__}: {error}). Use a distribution with log_prob, or a flow with an inverse; or "
            f"{advice().rather('SurrogateKD')}."
        ) from error


def log_prob_of_many(fn: Any, value: Tensor) -> Tensor:
    """``fn.log_prob(value)`` for many values of each element; its logarithms are computed once an element for bits.

    Args:
        fn: a distribution.
        value: values of shape ``(n, *batch_shape, *event_shape)``.

    Returns:
        Tensor of shape ``(n, *batch_shape)``.
    """
    bits = _bits(fn)
    if bits is None:
        found: Tensor = fn.log_prob(value)
        return found
    if bits._validate_args:
        bits._validate_sample(value)
    log_prob = torch.where(value > 0.5, logsigmoid(bits.logits), logsigmoid(-bits.logits))
    return sum_rightmost(log_prob, len(fn.event_shape))


def _bits(fn: Any) -> Any:
    """The Bernoulli distribution of each element of an event; None if the distribution is a different one."""
    while type(fn) is dist.Independent:
        fn = fn.base_dist
    return fn if type(fn) is dist.Bernoulli else None
