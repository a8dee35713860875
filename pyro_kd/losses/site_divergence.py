"""The divergence at one pair of sites. Where there is none, the error names the site and a way out."""

import warnings
from typing import NamedTuple

from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import is_validation_enabled
from torch import Tensor

from pyro_kd.divergences import Divergence
from pyro_kd.divergences.log_densities import share_rounded
from pyro_kd.errors import PyroKDError, SupportMismatchError, UnsupportedDivergenceError
from pyro_kd.noise.samplers import unwrapped
from pyro_kd.sites.pairing import SitePair

__all__ = ["SiteDivergence"]

_MOST_ROUNDED = 1e-3
"""An estimate is called biased if at least this share of its draws lies at the border of a support."""


class SiteDivergence(NamedTuple):
    """A divergence to compute at a pair of sites.

    Attributes:
        pair: the sites.
        divergence: the divergence.
        divisor: what the sum over plates is divided by: the size of an event, or a number of particles.
    """

    pair: SitePair
    divergence: Divergence
    divisor: int

    def total(self) -> Tensor:
        """The divergence summed over plates, with scale and mask, and divided: a scalar tensor.

        Raises:
            UnsupportedDivergenceError: the pair has no such divergence, or the function returned a wrong shape.
            SupportMismatchError: the teacher's draw is outside the student's support.
        """
        pair = self.pair
        value = _value_at(pair, self.divergence)
        is_plain = pair.mask is None and isinstance(pair.scale, float) and pair.scale == 1.0
        total = (value if is_plain else scale_and_mask(value, pair.scale, pair.mask)).sum()
        return total if self.divisor == 1 else total / self.divisor


def _value_at(pair: SitePair, divergence: Divergence) -> Tensor:
    try:
        value = divergence(pair.p, pair.q, pair.value)
    except UnsupportedDivergenceError as error:
        raise UnsupportedDivergenceError(f"site {pair.name!r}: {error}") from error
    except PyroKDError:
        raise
    except ValueError as error:  # torch's check of values
        raise SupportMismatchError(
            f"site {pair.name!r}: the teacher's draw, from {type(unwrapped(pair.p)).__name__}, is outside the support of the "
            f"student's {type(unwrapped(pair.q)).__name__} ({str(error).splitlines()[0]}). Give the student a distribution over the "
            "same values at this site."
        ) from error
    except (NotImplementedError, KeyError) as error:  # KeyError: a flow without inverse
        raise UnsupportedDivergenceError(
            f"site {pair.name!r}: {type(unwrapped(pair.p)).__name__} and {type(unwrapped(pair.q)).__name__} have no closed form, "
            f"and one has no density to estimate from ({type(error).__name__}: {error}). Use a distribution with log_prob, or "
            "pass your own function d(p, q, value) as divergence or latent_divergence."
        ) from error
    if not isinstance(value, Tensor) or value.shape != getattr(pair.p, "batch_shape", value.shape):
        returned = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}, no tensor"
        raise UnsupportedDivergenceError(
            f"site {pair.name!r}: the divergence returned {returned}, and the site has batch shape "
            f"{tuple(pair.p.batch_shape)}. Sum over the event dimensions {tuple(pair.p.event_shape)} only."
        )
    if is_validation_enabled():
        _warn_of_rounded_draws(pair, divergence, value)
    return value


def _warn_of_rounded_draws(pair: SitePair, divergence: Divergence, found: Tensor) -> None:
    """Warn if draws at the border of a support bias an estimate: those of a Gamma with a tiny concentration underflow."""
    is_at_students_draw = divergence.draws_from_student and pair.q.has_rsample
    if divergence.exact is None or is_at_students_draw or share_rounded(pair.p, pair.q, pair.value) < _MOST_ROUNDED:
        return
    if divergence.is_exact(pair.p, pair.q) or not found.any():  # equal distributions have equal densities there too
        return
    p, q = (type(unwrapped(fn)).__name__ for fn in (pair.p, pair.q))
    warnings.warn(
        f"site {pair.name!r}: the estimate of {divergence.name} is biased: some of the teacher's draws, of {p}, are rounded to "
        f"the border of their support in {pair.value.dtype}, and their density under the student's {q} is that of the rounded ones. "
        "Bound the parameters away from such extremes, compute in torch.float64, or give both programs a pair of families with a "
        "closed form (docs/distributions.md).",
        stacklevel=2,
    )
