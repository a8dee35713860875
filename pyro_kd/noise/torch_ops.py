"""The table of torch's random operations, each as a map from parameter-free noise to its draw.

An operation with a fixed law keeps its draw, and a location and a scale are applied to it. If the law depends on parameters in
a different way, the map is the inverse distribution function for ordered values (the optimal coupling), or the Gumbel-max rule for
categories (a near-maximal coupling, whatever their order). To support a new operation, add a function here.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_kd.noise.inverse_functions import binomial_icdf, gamma_icdf, poisson_icdf
from pyro_kd.noise.laws import NoiseLaw
from pyro_kd.noise.quantiles import binomial_quantile, gamma_quantile, poisson_quantile
from pyro_kd.noise.single_operations import single_operation
from pyro_kd.utils.torch_internals import overload_name

__all__ = ["TRANSFORMS", "Source"]

aten = torch.ops.aten

Generator = torch.Generator | None
Transform = Callable[..., Any]

TRANSFORMS: dict[Any, Transform] = {}
"""Overload of a torch operation -> ``transform(draw, *args, **kwargs)``, which takes the operation's own arguments."""


class Source(Protocol):
    """The tape as a transform sees it: returns the next noise, newly drawn or recorded."""

    def __call__(
        self, law: NoiseLaw, shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: Generator = None, /
    ) -> Tensor:
        """Return noise that may be changed in place."""
        ...


def _transform(*ops: Any) -> Callable[[Transform], Transform]:
    def register(fn: Transform) -> Transform:
        TRANSFORMS.update(dict.fromkeys(ops, fn))
        return fn

    return register


def _uniform64(draw: Source, shape: Sequence[int], device: torch.device, generator: Generator) -> Tensor:
    """Uniform noise for an inverse distribution function, in float64 to resolve the tails of float32 values."""
    return draw(NoiseLaw.UNIFORM, shape, torch.float64, device, generator)


def _factory(
    dtype: torch.dtype | None, device: torch.device | None, like: Tensor | None = None
) -> tuple[torch.dtype, torch.device]:
    if dtype is None:
        dtype = torch.get_default_dtype() if like is None else like.dtype
    if device is None:
        device = torch.get_default_device() if like is None else like.device
    return dtype, torch.device(device)


# Standard laws.


@_transform(aten.randn.default, aten.randn.generator)
def _randn(
    draw: Source, size: Any, *, generator: Generator = None, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return draw(NoiseLaw.NORMAL, size, *_factory(dtype, device), generator)


@_transform(aten.randn_like.default, aten.randn_like.generator)
def _randn_like(
    draw: Source, like: Tensor, *, generator: Generator = None, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return draw(NoiseLaw.NORMAL, like.shape, *_factory(dtype, device, like), generator)


@_transform(aten.rand.default, aten.rand.generator)
def _rand(
    draw: Source, size: Any, *, generator: Generator = None, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return draw(NoiseLaw.UNIFORM, size, *_factory(dtype, device), generator)


@_transform(aten.rand_like.default, aten.rand_like.generator)
def _rand_like(
    draw: Source, like: Tensor, *, generator: Generator = None, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return draw(NoiseLaw.UNIFORM, like.shape, *_factory(dtype, device, like), generator)


@_transform(aten.randperm.default, aten.randperm.generator)
def _randperm(
    draw: Source, n: int, *, generator: Generator = None, dtype: Any = torch.int64, device: Any = None, **_: Any
) -> Tensor:
    return draw(NoiseLaw.PERMUTATION, (n,), *_factory(dtype or torch.int64, device), generator)


@_transform(aten.randint.default, aten.randint.generator)
def _randint(draw: Source, high: int, size: Any, **kwargs: Any) -> Tensor:
    return _randint_low(draw, 0, high, size, **kwargs)


@_transform(aten.randint.low, aten.randint.low_generator)
def _randint_low(
    draw: Source,
    low: int,
    high: int,
    size: Any,
    *,
    generator: Generator = None,
    dtype: Any = torch.int64,
    device: Any = None,
    **_: Any,
) -> Tensor:
    dtype, device = _factory(dtype or torch.int64, device)
    return (low + (high - low) * _uniform64(draw, size, device, generator)).floor().to(dtype)


@_transform(aten.randint_like.default, aten.randint_like.generator)
def _randint_like(draw: Source, like: Tensor, high: int, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
    return _randint_like_low(draw, like, 0, high, dtype=dtype, device=device, **kwargs)


@_transform(aten.randint_like.low_dtype, aten.randint_like.low_generator_dtype)
def _randint_like_low(
    draw: Source, like: Tensor, low: int, high: int, *, dtype: Any = None, device: Any = None, **kwargs: Any
) -> Tensor:
    dtype, device = _factory(dtype, device, like)
    return _randint_low(draw, low, high, like.shape, dtype=dtype, device=device, **kwargs)


@_transform(getattr(aten.random_, "from"))
def _random_from_(draw: Source, self: Tensor, low: int, high: int | None, *, generator: Generator = None) -> Tensor:
    high = _largest_integer(self.dtype) + 1 if high is None else high
    return self.copy_(_randint_low(draw, low, high, self.shape, generator=generator, device=self.device))


@_transform(aten.random_.to)
def _random_to_(draw: Source, self: Tensor, high: int, *, generator: Generator = None) -> Tensor:
    return self.copy_(_randint_low(draw, 0, high, self.shape, generator=generator, device=self.device))


@_transform(aten.random_.default)
def _random_(draw: Source, self: Tensor, *, generator: Generator = None) -> Tensor:
    return _random_to_(draw, self, _largest_integer(self.dtype) + 1, generator=generator)


def _largest_integer(dtype: torch.dtype) -> int:
    """The largest integer that ``Tensor.random_`` draws: a type holds all integers up to it."""
    if dtype is torch.bool:
        return 1
    return round(2 / torch.finfo(dtype).eps) if dtype.is_floating_point else int(torch.iinfo(dtype).max)


# Location-scale families, filled in place: affine maps of the standard law.


@_transform(aten.normal_.default)
def _normal_(draw: Source, self: Tensor, mean: float = 0, std: float = 1, *, generator: Generator = None) -> Tensor:
    return self.copy_(mean + std * draw(NoiseLaw.NORMAL, self.shape, self.dtype, self.device, generator))


@_transform(aten.normal.Tensor_Tensor, aten.normal.Tensor_float, aten.normal.float_Tensor)
def _normal(draw: Source, mean: Any, std: Any = 1.0, *, generator: Generator = None) -> Tensor:
    total = mean + std
    return mean + std * draw(NoiseLaw.NORMAL, total.shape, total.dtype, total.device, generator)


@_transform(aten.normal.float_float)
def _normal_floats(
    draw: Source,
    mean: float,
    std: float,
    size: Any,
    *,
    generator: Generator = None,
    dtype: Any = None,
    device: Any = None,
    **_: Any,
) -> Tensor:
    return mean + std * draw(NoiseLaw.NORMAL, size, *_factory(dtype, device), generator)


@_transform(aten.uniform_.default)
def _uniform_(draw: Source, self: Tensor, low: float = 0, high: float = 1, *, generator: Generator = None) -> Tensor:
    return self.copy_(low + (high - low) * draw(NoiseLaw.UNIFORM, self.shape, self.dtype, self.device, generator))


@_transform(aten.exponential_.default)
def _exponential_(draw: Source, self: Tensor, rate: float = 1, *, generator: Generator = None) -> Tensor:
    return self.copy_(draw(NoiseLaw.EXPONENTIAL, self.shape, self.dtype, self.device, generator) / rate)


@_transform(aten.cauchy_.default)
def _cauchy_(draw: Source, self: Tensor, median: float = 0, sigma: float = 1, *, generator: Generator = None) -> Tensor:
    return self.copy_(median + sigma * draw(NoiseLaw.CAUCHY, self.shape, self.dtype, self.device, generator))


@_transform(aten.log_normal_.default)
def _log_normal_(draw: Source, self: Tensor, mean: float = 1, std: float = 2, *, generator: Generator = None) -> Tensor:
    return self.copy_((mean + std * draw(NoiseLaw.NORMAL, self.shape, self.dtype, self.device, generator)).exp())


# Layers that draw noise of a fixed law, whatever their input.


@_transform(aten.native_dropout.default)
def _native_dropout(draw: Source, input: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    mask = draw(NoiseLaw.UNIFORM, input.shape, torch.float64, input.device) >= p
    return input * mask / (1 - p) if p < 1 else torch.zeros_like(input), mask


@_transform(aten.rrelu_with_noise.default)
def _rrelu_with_noise(
    draw: Source,
    input: Tensor,
    noise: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: Generator = None,
) -> Tensor:
    slope = lower + (upper - lower) * draw(NoiseLaw.UNIFORM, input.shape, input.dtype, input.device, generator)
    noise.copy_(torch.where(input <= 0, slope, torch.ones_like(slope)))
    return input * noise


@_transform(aten.rrelu_with_noise_.default)
def _rrelu_with_noise_(draw: Source, input: Tensor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input.copy_(_rrelu_with_noise(draw, input, noise, *args, **kwargs))


# Laws with parameters.


@_transform(aten.bernoulli.default)
def _bernoulli(draw: Source, probs: Tensor, *, generator: Generator = None) -> Tensor:
    return (_uniform64(draw, probs.shape, probs.device, generator) < probs).to(probs.dtype)


@_transform(aten.bernoulli.p)
def _bernoulli_p(draw: Source, self: Tensor, p: float, *, generator: Generator = None) -> Tensor:
    return (_uniform64(draw, self.shape, self.device, generator) < p).to(self.dtype)


@_transform(aten.bernoulli_.float, aten.bernoulli_.Tensor)
def _bernoulli_(draw: Source, self: Tensor, p: Any = 0.5, *, generator: Generator = None) -> Tensor:
    return self.copy_(_uniform64(draw, self.shape, self.device, generator) < p)


@_transform(aten.geometric_.default)
def _geometric_(draw: Source, self: Tensor, p: float, *, generator: Generator = None) -> Tensor:
    u = _uniform64(draw, self.shape, self.device, generator)
    return self.copy_((torch.log1p(-u) / torch.log1p(torch.tensor(-p, dtype=u.dtype))).floor() + 1)


@_transform(aten.multinomial.default)
def _multinomial(
    draw: Source, probs: Tensor, num_samples: int, replacement: bool = False, *, generator: Generator = None
) -> Tensor:
    # The Gumbel-max rule in its exponential form: argmax p_i / E_i. The order of the categories does not matter, and p_i = 0 is
    # never drawn. Without replacement: the num_samples largest, in order (Efraimidis and Spirakis 2006).
    probs = probs.double()
    rows, categories = probs.shape[:-1], probs.shape[-1]
    if replacement:
        shape = (*rows, num_samples, categories)
        race = probs.unsqueeze(-2) / draw(NoiseLaw.EXPONENTIAL, shape, torch.float64, probs.device, generator)
        return race.argmax(-1)
    race = probs / draw(NoiseLaw.EXPONENTIAL, probs.shape, torch.float64, probs.device, generator)
    return race.topk(num_samples).indices


@_transform(aten.poisson.default)
def _poisson(draw: Source, rate: Tensor, generator: Generator = None) -> Tensor:
    u = _uniform64(draw, rate.shape, rate.device, generator)
    return _quantile(poisson_quantile, poisson_icdf, u, rate).to(rate.dtype)


@_transform(aten.binomial.default)
def _binomial(draw: Source, count: Tensor, probs: Tensor, generator: Generator = None) -> Tensor:
    shape = torch.broadcast_shapes(count.shape, probs.shape)
    u = _uniform64(draw, shape, probs.device, generator)
    return _quantile(binomial_quantile, binomial_icdf, u, count, probs).to(count.dtype)


@_transform(aten._standard_gamma.default)
def _standard_gamma(draw: Source, concentration: Tensor, generator: Generator = None) -> Tensor:
    u = _uniform64(draw, concentration.shape, concentration.device, generator)
    return _quantile(gamma_quantile, gamma_icdf, u, concentration).to(concentration.dtype)


@_transform(aten._sample_dirichlet.default)
def _sample_dirichlet(draw: Source, concentration: Tensor, generator: Generator = None) -> Tensor:
    # Values only: torch's derivative of a Dirichlet draw belongs to a different map. pyro_kd.noise.families has the map with a
    # derivative; this one serves samplers without rsample that have a Dirichlet or Beta inside.
    u = _uniform64(draw, concentration.shape, concentration.device, generator)
    gamma = _quantile(gamma_quantile, gamma_icdf, u, concentration).clamp(min=1e-300)
    return (gamma / gamma.sum(-1, keepdim=True)).to(concentration.dtype)


def _quantile(quantile: Callable[..., Tensor], icdf: Callable[..., Tensor], u: Tensor, *parameters: Tensor) -> Tensor:
    """The quantile function; in an exported graph, the one of plain operations."""
    return single_operation(icdf, u, *parameters) if torch.compiler.is_exporting() else quantile(u, *parameters)


def _into(transform: Transform) -> Transform:
    """The same operation, which writes its result to ``out=``."""

    def filled(draw: Source, *args: Any, out: Tensor, **kwargs: Any) -> Tensor:
        result = transform(draw, *args, **kwargs)
        return out.resize_(result.shape).copy_(result)

    return filled


for _op, _found in tuple(TRANSFORMS.items()):
    _name = "out" if overload_name(_op) == "default" else f"{overload_name(_op)}_out"
    if _name in _op.overloadpacket.overloads():
        TRANSFORMS[getattr(_op.overloadpacket, _name)] = _into(_found)
