r"""Counts whose draws have a derivative: the implicit derivative of the inverse distribution function, interpolated over a step.

A count z with distribution function F is constant in its noise but for steps. At the ends of the step that holds z, where the noise
is :math:`F(z)` and :math:`F(z - 1)`, the quantile function moves with a parameter at the rate :math:`-\partial_\theta F / f(z)`,
where f is the mass function. The derivative of the draw is the mean of the two:

.. math::
    \frac{dz}{d\theta} = -\frac{\partial_\theta F(z) + \partial_\theta F(z - 1)}{2 f(z)}

By the trapezoidal rule, :math:`E[h'(z)\, dz/d\theta]` is then the derivative of :math:`E[h(z)]` for every polynomial h of degree 2
or less, and close to it where h is smooth over a step of 1. The values of the draws are those of the family's own sampler, bit for
bit.

Source: Figurnov, Mohamed and Mnih, Implicit Reparameterization Gradients, NeurIPS 2018, eq. 6, for continuous laws; the mean over a
step is ours. Distributions only, below the handlers of :mod:`pyro_kd.noise.messengers`."""

import copy
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_kd.errors import UnsupportedGradientError
from pyro_kd.utils.autograd import with_slope

__all__ = ["IMPLICIT_FAMILIES", "implicit"]

_Sampler = Callable[[Any, torch.Size], Tensor]
_WRAPPERS = (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)
_SAMPLERS: dict[type, _Sampler] = {}
_SUBCLASSES: dict[type, type] = {}


def implicit(fn: Any) -> Any:
    """A distribution with the law and the draws of ``fn``, whose draws have the implicit derivative.

    Args:
        fn: a distribution of counts, also inside of ``to_event``, ``expand`` or ``mask``. It is not changed. A Bernoulli counts as
            one trial.

    Raises:
        UnsupportedGradientError: the family has no such derivative here.

    Example:
        >>> rate = torch.tensor([3.0, 0.5], requires_grad=True)
        >>> z = implicit(dist.Poisson(rate)).rsample((1000,))
        >>> z.mean(0).sum().backward()
        >>> bool(((rate.grad - 1).abs() < 0.2).all())  # the mean of a Poisson is its rate
        True
    """
    if isinstance(fn, _WRAPPERS):
        new = copy.copy(fn)
        new.__dict__["base_dist"] = implicit(fn.base_dist)
        return new
    sampler = _sampler_of(type(fn))
    if sampler is None:
        raise UnsupportedGradientError(
            f"{type(fn).__name__} has no implicit derivative: {', '.join(IMPLICIT_FAMILIES)} have one"
        )
    new = copy.copy(fn)
    if type(fn) not in _SUBCLASSES:
        own = {"has_rsample": True, "rsample": lambda self, shape=(): sampler(self, torch.Size(shape))}
        _SUBCLASSES[type(fn)] = type(type(fn).__name__, (type(fn),), own)
    new.__class__ = _SUBCLASSES[type(fn)]
    return new


def _sampler_of(family: type) -> _Sampler | None:
    """The sampler of a family, or of its base class if it does not override how that draws."""
    for base in family.__mro__:
        if base in _SAMPLERS:
            return _SAMPLERS[base]
        if "sample" in vars(base) or "rsample" in vars(base):
            return None
    return None


def _register(*families: type) -> Callable[[_Sampler], _Sampler]:
    def register(sampler: _Sampler) -> _Sampler:
        _SAMPLERS.update(dict.fromkeys(families, sampler))
        return sampler

    return register


@_register(dist.Poisson)
def _sample_poisson(fn: Any, sample_shape: torch.Size) -> Tensor:
    value = fn.sample(sample_shape)
    rate = fn.rate
    return with_slope(value, (1 + value / rate.detach().clamp(min=torch.finfo(rate.dtype).tiny)) / 2, rate)


@_register(dist.Binomial)
def _sample_binomial(fn: Any, sample_shape: torch.Size) -> Tensor:
    value = fn.sample(sample_shape)
    p = fn.probs.detach()
    return with_slope(value, (p * (fn.total_count - value) + (1 - p) * value) / 2, fn.logits)


@_register(dist.Bernoulli)
def _sample_bernoulli(fn: Any, sample_shape: torch.Size) -> Tensor:
    value = fn.sample(sample_shape)
    p = fn.probs.detach()
    return with_slope(value, (p * (1 - value) + (1 - p) * value) / 2, fn.logits)


@_register(dist.Geometric)
def _sample_geometric(fn: Any, sample_shape: torch.Size) -> Tensor:
    value = fn.sample(sample_shape)
    return with_slope(value, -((value + 1) * (1 - fn.probs.detach()) + value) / 2, fn.logits)


# Mixtures draw a parameter first: its derivative at fixed noise is exact, and the count follows it.


@_register(dist.NegativeBinomial, dist.GammaPoisson)
def _sample_gamma_poisson(fn: Any, sample_shape: torch.Size) -> Tensor:
    return _draw(dist.Poisson(fn._gamma.rsample(sample_shape), validate_args=False))


@_register(dist.BetaBinomial)
def _sample_beta_binomial(fn: Any, sample_shape: torch.Size) -> Tensor:
    return _draw(dist.Binomial(fn.total_count, fn._beta.rsample(sample_shape), validate_args=False))


@_register(dist.ZeroInflatedDistribution)
def _sample_zero_inflated(fn: Any, sample_shape: torch.Size) -> Tensor:
    shape = fn._extended_shape(sample_shape)
    is_zero = _draw(dist.Bernoulli(fn.gate.expand(shape), validate_args=False))
    return (1 - is_zero) * _draw(fn.base_dist.expand(shape))


def _draw(fn: Any) -> Tensor:
    value: Tensor = implicit(fn).rsample()
    return value


IMPLICIT_FAMILIES = tuple(sorted(family.__name__ for family in _SAMPLERS))
"""The names of the families whose counts have the implicit derivative."""
