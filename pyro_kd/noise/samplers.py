r"""The registry of samplers whose raw draws the tape can replay exactly.

Most distributions need nothing here: their own ``rsample`` or ``sample`` under a :class:`~pyro_kd.noise.tape.NoiseTape` is a
function of its raw draws, and autograd gives the derivative of that function. :func:`register_sampler` gives a family an
explicit sampler, written in torch operations that the tape replays, if

- the derivative of its ``rsample`` does not belong to the map that made the value (Dirichlet, and Beta, which is built on it);
- its draws change their order when parameters change, so that slightly different programs draw very different values
  (rejection samplers that draw again for what is still missing).

A family is looked up along its method resolution order, up to the class that defines the sampler, so a subclass with its
own ``rsample`` or ``sample`` keeps it. Distributions inside others (``Independent``, ``TransformedDistribution``,
the Dirichlet inside a Beta) are found through the attributes of the outer one. :mod:`pyro_kd.noise.families` holds the entries.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.distribution import Distribution as PyroDistribution
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from pyro_kd.errors import UnsupportedNoiseError
from pyro_kd.noise.borders import keep_inside, remembering
from pyro_kd.noise.tape import NoiseTape
from pyro_kd.utils.pyro_internals import Subsample
from pyro_kd.utils.user_code import called

__all__ = [
    "draw_of",
    "draws_nothing",
    "has_derivative",
    "is_registered",
    "register_sampler",
    "replayable",
    "sample_on",
    "unwrapped",
]

Sampler = Callable[[Any, torch.Size], Tensor]

_SAMPLERS: dict[type, type] = {}  # family -> mixin class that carries the explicit sampler
_SUBCLASSES: dict[tuple[type, type], type] = {}

DIRECT: dict[type, Callable[[Any, NoiseTape], Tensor]] = {}
"""Families that are drawn without the cost of a dispatch mode, by the arithmetic that the tape would do."""


def register_sampler(family: type[Distribution]) -> Callable[[Sampler], Sampler]:
    """Register ``sampler(fn, sample_shape) -> value`` as the map from noise to value of a family.

    Args:
        family: the distribution class. Subclasses that do not override its sampler are included.

    Returns:
        A decorator. The sampler draws with torch's operations (``torch.rand``, ``torch._standard_gamma``, the ``rsample`` of a
        different distribution) and returns a tensor of shape ``sample_shape + fn.batch_shape + fn.event_shape``. It runs under
        autograd if the family has ``rsample``.

    Example:
        The inverse distribution function for a family whose ``rsample`` uses a rejection loop::

            @pyro_kd.register_sampler(MyTriangular)
            def sample_triangular(fn, sample_shape):
                u = torch.rand(sample_shape + fn.batch_shape)
                return fn.low + (fn.high - fn.low) * u.sqrt()
    """

    if not isinstance(family, type):
        raise TypeError(
            f"register_sampler takes the class of a distribution, as in @register_sampler(Family), not {family!r:.60}"
        )

    def register(sampler: Sampler) -> Sampler:
        def draw(self: Any, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
            what = f"the registered sampler of {family.__name__}"
            value = called(sampler, what, "f(fn, sample_shape)", self, torch.Size(sample_shape))
            return _checked(value, self, sample_shape, family)

        def draw_detached(self: Any, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
            with torch.no_grad():
                return draw(self, sample_shape)

        DIRECT.pop(family, None)
        _SAMPLERS[family] = type(f"Replayable{family.__name__}", (), {"rsample": draw, "sample": draw_detached})
        return sampler

    return register


def _checked(value: Any, fn: Any, sample_shape: torch.Size, family: type) -> Tensor:
    """What a registered sampler returned, if it has the shape of a draw."""
    shape = (*sample_shape, *fn.batch_shape, *fn.event_shape)
    if not isinstance(value, Tensor) or value.shape != shape:
        returned = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}"
        raise ValueError(
            f"the sampler that @register_sampler has for {family.__name__} returned {returned}, and should return a tensor of "
            f"shape {shape}, which is sample_shape + fn.batch_shape + fn.event_shape"
        )
    return value


def sample_on(tape: NoiseTape, fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Draw ``fn(*args, **kwargs)`` as a function of the noise that the tape records or supplies.

    Raises:
        UnsupportedNoiseError: the derivative of the family's sampler does not belong to the map that made the value.
        NoiseMismatchError: the noise on the tape does not fit.
    """
    if not args and not kwargs:
        base = fn
        while type(base) is dist.Independent:
            base = base.base_dist
        direct = DIRECT.get(type(base))
        if direct is not None:
            value = direct(base, tape)
            return value if fn.has_rsample else value.detach()
    sampler = replayable(fn)
    # Without rsample, a derivative that the sampler leaves is incomplete: none is passed on.
    no_gradient = isinstance(fn, Distribution | PyroDistribution) and not has_derivative(fn)
    with tape, torch.no_grad() if no_gradient else nullcontext():
        value = remembering(sampler)(*args, **kwargs)
    if tape.has_foreign_derivative and isinstance(value, Tensor) and value.requires_grad:
        raise UnsupportedNoiseError(
            "it draws from a Dirichlet or Beta inside its rsample, whose derivative in torch belongs to a different map"
        )
    return keep_inside(value, fn)


def draw_of(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Draw from ``fn`` by its own sampler, with noise that is not shared, from the inside of its support.

    Beta and Kumaraswamy use the registered sampler, whose draws carry what they were before they were rounded to 0 or 1.
    """
    sampler = replayable(fn) if isinstance(unwrapped(fn), td.Beta | td.Kumaraswamy) else fn
    return keep_inside(remembering(sampler)(*args, **kwargs), fn)


def replayable(fn: Any) -> Any:
    """Return a distribution with the law of ``fn`` whose sampler a tape can record and replay.

    This is ``fn`` itself if its own sampler will do. ``fn`` is never changed.
    """
    if not isinstance(fn, Distribution):
        return fn  # a plain callable, or Pyro's plate subsampling: the tape replays whatever it draws
    family = _governing_class(type(fn))
    if family in _SAMPLERS:
        new = copy.copy(fn)
        key = (type(fn), _SAMPLERS[family])
        if key not in _SUBCLASSES:
            _SUBCLASSES[key] = type(type(fn).__name__, (_SAMPLERS[family], type(fn)), {})
        new.__class__ = _SUBCLASSES[key]
        return new
    changed = {name: new for name, value in vars(fn).items() if (new := _replayable_inside(value)) is not value}
    if not changed:
        return fn
    new = copy.copy(fn)
    vars(new).update(changed)
    return new


def _replayable_inside(value: Any) -> Any:
    """The same for an attribute of a distribution that is a distribution, or a list of them."""
    if isinstance(value, Distribution):
        return replayable(value)
    if type(value) in (list, tuple):
        items = type(value)(_replayable_inside(item) for item in value)
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value


_WRAPPERS = (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)


def unwrapped(fn: Any) -> Any:
    """The distribution under ``to_event``, ``mask`` and ``expand``."""
    while "base_dist" in getattr(fn, "__dict__", ()) and isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


# Pyro's rsample gives their weights the gradient of a transport of mass, which holds for a function of the value alone, and not for
# one of shared noise as well. Here a component is drawn, without a derivative.
_OF_COMPONENTS = (dist.MixtureOfDiagNormals, dist.MixtureOfDiagNormalsSharedCovariance, dist.GaussianScaleMixture)


def has_derivative(fn: Any) -> bool:
    """Whether a draw is differentiable in all parameters, as a function of the noise: not where a component is drawn."""
    return getattr(fn, "has_rsample", False) and not _draws_component(fn)


def _draws_component(fn: Any) -> bool:
    if any(isinstance(fn, kind) and type(fn).rsample is kind.rsample for kind in _OF_COMPONENTS):
        return True
    parts = (getattr(fn, "__dict__", {}).get(name) for name in ("base_dist", "component0", "component1"))
    return any(part is not None and _draws_component(part) for part in parts)


def draws_nothing(fn: Any) -> bool:
    """Whether a distribution needs no noise: a point mass, a factor, or a plate that takes all its indices."""
    while isinstance(getattr(fn, "base_dist", None), Distribution):
        fn = fn.base_dist
    if isinstance(fn, Subsample):
        return fn.subsample_size is None or fn.subsample_size >= fn.size
    return isinstance(fn, dist.Delta | dist.Unit)


def is_registered(fn: Any) -> bool:
    """Whether the sampler of a distribution is registered. Then its author decides what it draws, which may be nothing."""
    fn = unwrapped(fn)
    return isinstance(fn, Distribution) and _governing_class(type(fn)) in _SAMPLERS


def _governing_class(cls: type) -> type | None:
    """The first class along the resolution order that is registered, or that defines the sampler itself."""
    for base in cls.__mro__:
        if base in _SAMPLERS:
            return base
        if "rsample" in vars(base) or "sample" in vars(base):
            return None
    return None
