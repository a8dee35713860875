r"""The noise tape: records the raw random draws under a sampler, and supplies them again.

A sampler is a deterministic function of the raw random numbers that it draws, and torch has about two dozen operations
that draw them. So the map :math:`g` of the semi-auxiliary form :math:`z = g(Pa, \epsilon)` (Chen et al. 2023, section
3.1) is the distribution's own ``rsample`` or ``sample``, run under a :class:`~torch.utils._python_dispatch.TorchDispatchMode`
that intercepts those operations. Where the law of an operation depends on parameters (``bernoulli``, ``multinomial``,
``poisson``, ...), the tape draws a noise of fixed law and applies the map from noise to draw itself: the table at the
end of this file lists every operation with its map.

Autograd lies above the dispatcher. So a derivative through the recorded sampler is the derivative of :math:`g` at
fixed noise, also for ``torch._standard_gamma``, whose implicit derivative is that of the inverse distribution function
which the tape uses.

The tape knows tensors and no sites: :mod:`pyro_kd.handlers` puts one under each sample site.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_kd.errors import NoiseMismatchError, UnsupportedNoiseError
from pyro_kd.quantiles import binomial_quantile, gamma_quantile, poisson_quantile

__all__ = ["Draw", "Kind", "NoiseTape"]

aten = torch.ops.aten


class Kind(Enum):
    """The parameter-free laws of noise."""

    NORMAL = "standard normal"
    UNIFORM = "uniform on [0, 1)"
    EXPONENTIAL = "standard exponential"
    CAUCHY = "standard Cauchy"
    PERMUTATION = "uniform permutation"

    def sample(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw a tensor of this law."""
        if self is Kind.PERMUTATION:
            return torch.randperm(shape[0], dtype=dtype, device=device, generator=generator)
        if self is Kind.UNIFORM:
            return torch.rand(shape, dtype=dtype, device=device, generator=generator)
        empty = torch.empty(shape, dtype=dtype, device=device)
        if self is Kind.NORMAL:
            return empty.normal_(generator=generator)
        if self is Kind.EXPONENTIAL:
            return empty.exponential_(generator=generator)
        return empty.cauchy_(generator=generator)


@dataclass(frozen=True, slots=True)
class Draw:
    """One raw random draw: noise of a fixed law.

    Attributes:
        kind: the law.
        noise: the tensor drawn from it.
        op: the torch operation that asked for it, for error messages.
    """

    kind: Kind
    noise: Tensor
    op: str

    def describe(self) -> str:
        """Law, shape and purpose, for error messages."""
        return f"{self.kind.value} noise of shape {tuple(self.noise.shape)} (for {self.op})"


class NoiseTape(TorchDispatchMode):
    """Records the raw draws made inside its context, or supplies recorded ones in their place.

    Args:
        recorded: draws to supply, in their order. ``None`` records new ones.

    Attributes:
        draws: what was drawn or supplied so far.

    Raises:
        NoiseMismatchError: a draw differs in kind or shape from the recorded one, or there are more draws than were
            recorded. :meth:`finish` raises it where there are fewer.
        UnsupportedNoiseError: a random operation has no map from noise, or the sampler decides by the values that it
            drew how often to draw again (a rejection sampler).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with NoiseTape() as tape:
        ...     x = torch.distributions.Poisson(torch.tensor([3.0, 10.0])).sample()
        >>> with NoiseTape(tape.draws):
        ...     y = torch.distributions.Poisson(torch.tensor([3.0, 11.0])).sample()
        >>> x, y
        (tensor([ 7., 12.]), tensor([ 7., 13.]))
    """

    def __init__(self, recorded: Iterable[Draw] | None = None) -> None:
        super().__init__()
        self.draws: list[Draw] = []
        self._recorded = None if recorded is None else tuple(recorded)
        self._ops_before_read: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        transform = _TRANSFORMS.get(func)
        if transform is not None:
            op = func.overloadpacket.__name__
            if op in self._ops_before_read:
                raise UnsupportedNoiseError(
                    f"the sampler draws ({op}), reads the drawn values, and draws ({op}) again: a rejection sampler "
                    "is no function of a fixed number of draws"
                )
            return transform(_Source(self, op), *args, **(kwargs or {}))
        if func is aten._local_scalar_dense.default:
            # A truth value or a number decides what comes next; an integer is an index, and validation draws nothing.
            decides = args[0].dtype == torch.bool or args[0].dtype.is_floating_point
            if decides and self.draws and not _in_argument_validation():
                self._ops_before_read.update(draw.op for draw in self.draws)
        elif torch.Tag.nondeterministic_seeded in func.tags:
            raise UnsupportedNoiseError(f"the random operation {func} has no map from parameter-free noise")
        return func(*args, **(kwargs or {}))

    def draw(
        self,
        kind: Kind,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        op: str,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The next noise: newly drawn and kept, or the recorded one, in the dtype and on the device asked for.

        The caller must not change it in place.

        Args:
            kind: law of the noise.
            shape, dtype, device: of the tensor to return.
            op: who asks, for error messages.
            generator: torch's random generator for a new draw.
        """
        if self._recorded is None:
            draw = Draw(kind, kind.sample(shape, dtype, device, generator), op)
        else:
            if len(self.draws) >= len(self._recorded):
                raise NoiseMismatchError(
                    f"draw number {len(self.draws) + 1} ({kind.value} noise of shape {tuple(shape)} for {op}) was not "
                    f"recorded: the record holds {len(self._recorded)}"
                )
            draw = self._recorded[len(self.draws)]
            if draw.kind is not kind or draw.noise.shape != torch.Size(shape):
                raise NoiseMismatchError(
                    f"the record holds {draw.describe()}, but {kind.value} noise of shape {tuple(shape)} (for {op}) is "
                    "asked for"
                )
        self.draws.append(draw)
        return draw.noise.to(dtype=dtype, device=device)

    def finish(self) -> None:
        """Check that every recorded draw was used."""
        if self._recorded is not None and len(self.draws) < len(self._recorded):
            raise NoiseMismatchError(
                f"{len(self._recorded)} draws were recorded and {len(self.draws)} were asked for; the next unused one "
                f"is {self._recorded[len(self.draws)].describe()}"
            )


class _Source:
    """What a transform sees of the tape: its next draw, under the name of the operation that asks for it."""

    __slots__ = ("op", "tape")

    def __init__(self, tape: NoiseTape, op: str) -> None:
        self.tape = tape
        self.op = op

    def __call__(
        self,
        kind: Kind,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        noise = self.tape.draw(kind, shape, dtype, device, op=self.op, generator=generator)
        return noise.clone()  # the sampler may change what it is given in place; the record must not change with it


def _in_argument_validation() -> bool:
    """Whether the caller is a distribution's constructor or ``log_prob``: these read values only to check them."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_name
        if name in ("__init__", "_validate_sample", "__instancecheck__") and "distributions" in frame.f_code.co_filename:
            return True
        if name == "__torch_dispatch__":
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


# ---------------------------------------------------------------------------------------------------------------------
# The table: a random operation of torch -> its map from parameter-free noise.

_Transform = Callable[..., Any]
_TRANSFORMS: dict[Any, _Transform] = {}
_Generator = torch.Generator | None


def _transform(*ops: Any) -> Callable[[_Transform], _Transform]:
    def register(fn: _Transform) -> _Transform:
        _TRANSFORMS.update(dict.fromkeys(ops, fn))
        return fn

    return register


def _uniform64(draw: _Source, shape: Sequence[int], device: torch.device, generator: _Generator) -> Tensor:
    """Uniform noise for an inverse distribution function: float64, so that tails are resolved for float32 values."""
    return draw(Kind.UNIFORM, shape, torch.float64, device, generator)


def _factory(
    dtype: torch.dtype | None, device: torch.device | None, like: Tensor | None = None
) -> tuple[torch.dtype, torch.device]:
    if dtype is None:
        dtype = torch.get_default_dtype() if like is None else like.dtype
    if device is None:
        device = torch.get_default_device() if like is None else like.device
    return dtype, torch.device(device)


def _no_out(op: Any) -> list[Any]:
    return [getattr(op, name) for name in op.overloads() if not name.endswith("out")]


# Standard laws, made from nothing.


@_transform(aten.randn.default, aten.randn.generator)
def _randn(
    draw: _Source, size: Any, *, generator: _Generator = None, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return draw(Kind.NORMAL, size, *_factory(dtype, device), generator)


@_transform(aten.randn_like.default)
def _randn_like(draw: _Source, like: Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return draw(Kind.NORMAL, like.shape, *_factory(dtype, device, like))


@_transform(aten.rand.default, aten.rand.generator)
def _rand(
    draw: _Source, size: Any, *, generator: _Generator = None, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return draw(Kind.UNIFORM, size, *_factory(dtype, device), generator)


@_transform(aten.rand_like.default)
def _rand_like(draw: _Source, like: Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return draw(Kind.UNIFORM, like.shape, *_factory(dtype, device, like))


@_transform(aten.randperm.default, aten.randperm.generator)
def _randperm(
    draw: _Source, n: int, *, generator: _Generator = None, dtype: Any = torch.int64, device: Any = None, **_: Any
) -> Tensor:
    return draw(Kind.PERMUTATION, (n,), *_factory(dtype or torch.int64, device), generator)


@_transform(aten.randint.default, aten.randint.generator)
def _randint(draw: _Source, high: int, size: Any, **kwargs: Any) -> Tensor:
    return _randint_low(draw, 0, high, size, **kwargs)


@_transform(aten.randint.low, aten.randint.low_generator)
def _randint_low(
    draw: _Source,
    low: int,
    high: int,
    size: Any,
    *,
    generator: _Generator = None,
    dtype: Any = torch.int64,
    device: Any = None,
    **_: Any,
) -> Tensor:
    dtype, device = _factory(dtype or torch.int64, device)
    return (low + (high - low) * _uniform64(draw, size, device, generator)).floor().to(dtype)


# Location-scale families, filled in place: the arguments are an affine map of the standard law.


@_transform(aten.normal_.default)
def _normal_(draw: _Source, self: Tensor, mean: float = 0, std: float = 1, *, generator: _Generator = None) -> Tensor:
    return self.copy_(mean + std * draw(Kind.NORMAL, self.shape, self.dtype, self.device, generator))


@_transform(aten.normal.Tensor_Tensor, aten.normal.Tensor_float, aten.normal.float_Tensor)
def _normal(draw: _Source, mean: Any, std: Any = 1.0, *, generator: _Generator = None) -> Tensor:
    total = mean + std
    return mean + std * draw(Kind.NORMAL, total.shape, total.dtype, total.device, generator)


@_transform(aten.normal.float_float)
def _normal_floats(
    draw: _Source,
    mean: float,
    std: float,
    size: Any,
    *,
    generator: _Generator = None,
    dtype: Any = None,
    device: Any = None,
    **_: Any,
) -> Tensor:
    return mean + std * draw(Kind.NORMAL, size, *_factory(dtype, device), generator)


@_transform(aten.uniform_.default)
def _uniform_(draw: _Source, self: Tensor, low: float = 0, high: float = 1, *, generator: _Generator = None) -> Tensor:
    return self.copy_(low + (high - low) * draw(Kind.UNIFORM, self.shape, self.dtype, self.device, generator))


@_transform(aten.exponential_.default)
def _exponential_(draw: _Source, self: Tensor, rate: float = 1, *, generator: _Generator = None) -> Tensor:
    return self.copy_(draw(Kind.EXPONENTIAL, self.shape, self.dtype, self.device, generator) / rate)


@_transform(aten.cauchy_.default)
def _cauchy_(draw: _Source, self: Tensor, median: float = 0, sigma: float = 1, *, generator: _Generator = None) -> Tensor:
    return self.copy_(median + sigma * draw(Kind.CAUCHY, self.shape, self.dtype, self.device, generator))


@_transform(aten.log_normal_.default)
def _log_normal_(draw: _Source, self: Tensor, mean: float = 1, std: float = 2, *, generator: _Generator = None) -> Tensor:
    return self.copy_((mean + std * draw(Kind.NORMAL, self.shape, self.dtype, self.device, generator)).exp())


# Laws with parameters.


@_transform(aten.bernoulli.default)
def _bernoulli(draw: _Source, probs: Tensor, *, generator: _Generator = None) -> Tensor:
    return (_uniform64(draw, probs.shape, probs.device, generator) < probs).to(probs.dtype)


@_transform(aten.bernoulli.p)
def _bernoulli_p(draw: _Source, self: Tensor, p: float, *, generator: _Generator = None) -> Tensor:
    return (_uniform64(draw, self.shape, self.device, generator) < p).to(self.dtype)


@_transform(aten.bernoulli_.float, aten.bernoulli_.Tensor)
def _bernoulli_(draw: _Source, self: Tensor, p: Any = 0.5, *, generator: _Generator = None) -> Tensor:
    return self.copy_(_uniform64(draw, self.shape, self.device, generator) < p)


@_transform(aten.geometric_.default)
def _geometric_(draw: _Source, self: Tensor, p: float, *, generator: _Generator = None) -> Tensor:
    u = _uniform64(draw, self.shape, self.device, generator)
    return self.copy_((torch.log1p(-u) / torch.log1p(torch.tensor(-p, dtype=u.dtype))).floor() + 1)


@_transform(aten.multinomial.default)
def _multinomial(
    draw: _Source, probs: Tensor, num_samples: int, replacement: bool = False, *, generator: _Generator = None
) -> Tensor:
    # The Gumbel-max rule in its exponential form: argmax p_i / E_i. No order of the categories matters, and p_i = 0 is
    # never drawn. Without replacement: the num_samples largest, in their order (Efraimidis and Spirakis 2006).
    probs = probs.double()
    rows, categories = probs.shape[:-1], probs.shape[-1]
    if replacement:
        shape = (*rows, num_samples, categories)
        race = probs.unsqueeze(-2) / draw(Kind.EXPONENTIAL, shape, torch.float64, probs.device, generator)
        return race.argmax(-1)
    race = probs / draw(Kind.EXPONENTIAL, probs.shape, torch.float64, probs.device, generator)
    return race.topk(num_samples).indices


@_transform(aten.poisson.default)
def _poisson(draw: _Source, rate: Tensor, generator: _Generator = None) -> Tensor:
    return poisson_quantile(_uniform64(draw, rate.shape, rate.device, generator), rate).to(rate.dtype)


@_transform(aten.binomial.default)
def _binomial(draw: _Source, count: Tensor, probs: Tensor, generator: _Generator = None) -> Tensor:
    shape = torch.broadcast_shapes(count.shape, probs.shape)
    return binomial_quantile(_uniform64(draw, shape, probs.device, generator), count, probs).to(count.dtype)


@_transform(aten._standard_gamma.default)
def _standard_gamma(draw: _Source, concentration: Tensor, generator: _Generator = None) -> Tensor:
    u = _uniform64(draw, concentration.shape, concentration.device, generator)
    return gamma_quantile(u, concentration).to(concentration.dtype)


@_transform(aten._sample_dirichlet.default)
def _sample_dirichlet(draw: _Source, concentration: Tensor, generator: _Generator = None) -> Tensor:
    # Values only: torch's derivative of a Dirichlet draw is that of another map. pyro_kd.samplers has the map that is
    # differentiated; this one serves samplers without rsample that have a Dirichlet or Beta inside.
    u = _uniform64(draw, concentration.shape, concentration.device, generator)
    gamma = gamma_quantile(u, concentration).clamp(min=1e-300)
    return (gamma / gamma.sum(-1, keepdim=True)).to(concentration.dtype)
