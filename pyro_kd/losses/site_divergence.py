"""The divergence at one pair of sites. If it cannot be computed, the error names the site and a remedy."""

import warnings
from typing import NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import is_validation_enabled
from torch import Tensor

from pyro_kd.divergences import Divergence
from pyro_kd.divergences.log_densities import share_rounded
from pyro_kd.errors import PyroKDError, SupportMismatchError, UnsupportedDivergenceError
from pyro_kd.noise.samplers import has_derivative, unwrapped
from pyro_kd.sites.pairing import SitePair
from pyro_kd.utils.advice import advice
from pyro_kd.utils.user_code import called

__all__ = ["SiteDivergence", "parted"]

_MOST_ROUNDED = 1e-3
"""An estimate counts as biased if at least this share of its draws lies on the border of a support."""


class SiteDivergence(NamedTuple):
    """A divergence to compute at a pair of sites.

    Attributes:
        pair: the sites.
        divergence: the divergence.
        divisor: the number that the sum over plates is divided by: the size of an event, times the number of vectorized particles.
        given: where the student was given some of the elements only, a boolean tensor of the batch shape that holds at these.
    """

    pair: SitePair
    divergence: Divergence
    divisor: int
    given: Tensor | None = None

    def totals(self) -> tuple[Tensor, ...]:
        """The divergence, summed over plates with scale and mask, and divided by ``divisor``.

        Returns:
            One scalar tensor; with ``given`` two, of the elements that the student drew and of those that it was given.

        Raises:
            UnsupportedDivergenceError: the pair has no such divergence, or the function returned the wrong shape.
            SupportMismatchError: the teacher's draw is outside the student's support.
        """
        value = self._weighted()
        parts = (value,) if self.given is None else parted(value, self.given)
        return tuple([part.sum() if self.divisor == 1 else part.sum() / self.divisor for part in parts])

    def elements(self) -> Tensor:
        """The parts of the total: a tensor of the site's batch shape."""
        elements = self._weighted()
        return elements if self.divisor == 1 else elements / self.divisor

    def _weighted(self) -> Tensor:
        """The divergence with scale and mask."""
        pair = self.pair
        value = _value_at(pair, self.divergence)
        is_plain = pair.mask is None and isinstance(pair.scale, float) and pair.scale == 1.0
        return value if is_plain else scale_and_mask(value, pair.scale, pair.mask)


def parted(value: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor without and with the elements at which ``given`` holds; the others are 0."""
    return torch.where(given, 0.0, value), torch.where(given, value, 0.0)


def _value_at(pair: SitePair, divergence: Divergence) -> Tensor:
    try:
        value = called(divergence, f"site {pair.name!r}: the divergence", "d(p, q, value)", pair.p, pair.q, pair.value)
    except UnsupportedDivergenceError as error:
        option = option_at(pair)
        way = f". Pass it as {option}" if "pyro_kd.divergences." in error.message and advice().takes(option) else ""
        raise UnsupportedDivergenceError(f"site {pair.name!r}: {error}{way}") from error
    except PyroKDError:
        raise
    except ValueError as error:  # torch's check of values
        raise SupportMismatchError(
            f"site {pair.name!r}: the teacher's draw, from {type(unwrapped(pair.p)).__name__}, is outside the support of the "
            f"student's {type(unwrapped(pair.q)).__name__} ({str(error).splitlines()[0].rstrip(':')}). Give the student a "
            "distribution over the same values at this site."
        ) from error
    except (NotImplementedError, KeyError) as error:  # KeyError: a flow without inverse
        option = option_at(pair)
        way = f", or pass your own function d(p, q, value) as {option}" if advice().takes(option) else ""
        raise UnsupportedDivergenceError(
            f"site {pair.name!r}: {type(unwrapped(pair.p)).__name__} and {type(unwrapped(pair.q)).__name__} have no closed form, and "
            f"one of them has no density for an estimate ({type(error).__name__}: {error}). Use a distribution with log_prob{way}."
        ) from error
    if not isinstance(value, Tensor) or value.shape != getattr(pair.p, "batch_shape", value.shape):
        returned = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}, not a tensor"
        raise UnsupportedDivergenceError(
            f"site {pair.name!r}: the divergence returned {returned}, but the site has batch shape "
            f"{tuple(pair.p.batch_shape)}. Sum only over the event dimensions {tuple(pair.p.event_shape)}."
        )
    if is_validation_enabled():
        _warn_of_rounded_draws(pair, divergence, value)
    return value


def option_at(pair: SitePair) -> str:
    """The option that chooses the divergence at a pair."""
    return "divergence" if pair.is_target else "latent_divergence"


def _warn_of_rounded_draws(pair: SitePair, divergence: Divergence, found: Tensor) -> None:
    """Warn if draws on the border of a support bias an estimate, such as those of a Gamma with a tiny concentration."""
    is_at_students_draw = divergence.draws_from_student and has_derivative(pair.q)
    if divergence.exact is None or is_at_students_draw or share_rounded(pair.p, pair.q, pair.value) < _MOST_ROUNDED:
        return
    if divergence.is_exact(pair.p, pair.q) or not found.any():  # equal distributions have equal densities there too
        return
    p, q = (type(unwrapped(fn)).__name__ for fn in (pair.p, pair.q))
    warnings.warn(
        f"site {pair.name!r}: the estimate of {divergence.name} is biased: in {pair.value.dtype}, some draws of the teacher's {p} "
        f"are rounded to the border of the support, where the density of the student's {q} is evaluated. Keep the "
        "parameters away from such extremes, compute in torch.float64, or use families that have a closed form "
        "(docs/distributions.md).",
        stacklevel=2,
    )
