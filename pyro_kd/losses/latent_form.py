r"""The form in which the latents of a run are compared: their conditional distributions, or their values.

Both forms are the paper's. With ``"conditional"`` (Eq. 6) the two distributions at a latent are compared, each given its parents in
its own program. With ``"value"`` (Eq. 5) the noise of the site itself is included. Then both sides are points, and the divergence is
a distance between them. Input and output are pairs of sites, before their divergence is computed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_kd.divergences import Divergence, DivergenceFunction, cross_entropy, jensen_shannon
from pyro_kd.errors import UnknownTargetError, UnsupportedDivergenceError, listing, nearest
from pyro_kd.noise.samplers import has_derivative, unwrapped
from pyro_kd.sites.pairing import SitePair
from pyro_kd.utils.user_code import called

__all__ = ["LatentForm", "check_form", "form_of", "in_form"]

LatentForm = str | Mapping[str, str] | Callable[[str], str]
"""``"conditional"`` or ``"value"``: for all latents, as a mapping by site name, or as a function of the site name."""

_FORMS = ("conditional", "value")
_OF_DENSITIES = (cross_entropy, jensen_shannon)


def check_form(form: LatentForm) -> None:
    """Raise ValueError or TypeError where ``latent_form`` is not one of the two forms, a mapping or a function."""
    if isinstance(form, str) and form not in _FORMS:
        raise ValueError(f"latent_form must be 'conditional' (Eq. 6) or 'value' (Eq. 5), not {form!r}")
    if not isinstance(form, str | Mapping) and not callable(form):
        raise TypeError(
            f"latent_form must be a form, a mapping by site name or a function of the site name, not {form!r:.60}"
        )


def form_of(name: str, form: LatentForm) -> str:
    """The form of a latent site: ``"conditional"`` or ``"value"``.

    Raises:
        UnknownTargetError: a mapping has no entry for the site.
        ValueError: it is neither of the two.
    """
    chosen: Any = form
    if isinstance(form, Mapping):
        if name not in form:
            raise UnknownTargetError(
                f"latent_form has no entry for the latent site {name!r}; it has {listing(form)}.{nearest(name, form)} "
                "Give every latent site a form: 'conditional' or 'value'."
            )
        chosen = form[name]
    elif not isinstance(form, str):
        chosen = called(form, f"site {name!r}: latent_form", "f(site_name)", name)
    if chosen not in _FORMS:
        raise ValueError(
            f"latent_form of site {name!r} is {chosen!r:.60}, but must be 'conditional' (Eq. 6) or 'value' (Eq. 5)"
        )
    return str(chosen)


def in_form(pair: SitePair, form: LatentForm, divergence: DivergenceFunction) -> SitePair:
    """A latent pair in the form in which it is compared.

    Args:
        pair: two distributions of one latent, of shape ``batch_shape + event_shape``.
        form: of the loss.
        divergence: the one that is to be taken.

    Returns:
        The pair itself, or the pair with two Deltas in place of its distributions, at the values of teacher and student. They have
        the same shapes, and the masks inside of ``to_event``.

    Raises:
        UnsupportedDivergenceError: the values have no distance that trains the student.
    """
    if form == "conditional" or form_of(pair.name, form) == "conditional":
        return pair
    _require_distance(pair, Divergence.of(divergence))
    return pair._replace(p=_point(pair.p, pair.value), q=_point(pair.q, pair.student_value))


def _point(fn: Any, value: Tensor) -> Any:
    """A Delta with the shapes and inner masks of a distribution."""
    if isinstance(fn, dist.Independent):
        return dist.Independent(_point(fn.base_dist, value), fn.reinterpreted_batch_ndims, validate_args=False)
    if isinstance(fn, dist.MaskedDistribution):
        return dist.MaskedDistribution(_point(fn.base_dist, value), fn._mask)
    shape = torch.Size(fn.batch_shape) + torch.Size(fn.event_shape)
    return dist.Delta(value.expand(shape), event_dim=len(fn.event_shape), validate_args=False)


def _require_distance(pair: SitePair, divergence: Divergence) -> None:
    back = f"Compare its conditional distributions: latent_form=lambda site: 'conditional' if site == {pair.name!r} else 'value'"
    if pair.is_given:
        raise UnsupportedDivergenceError(
            f"site {pair.name!r}: the student is given the teacher's value, so the two values are equal whatever the parameters, "
            "and latent_form='value' compares nothing. Use a loss in which latents are functions of the shared noise, such as "
            "SurrogateKD, or latent_form='conditional'."
        )
    if not has_derivative(pair.q):
        raise UnsupportedDivergenceError(
            f"site {pair.name!r}: latent_form='value' compares values, but a value of the student's "
            f"{type(unwrapped(pair.q)).__name__} has no derivative, so the term would not train it. {back}. With latent_weight 0 "
            "the site is left out."
        )
    if divergence in _OF_DENSITIES:
        raise UnsupportedDivergenceError(
            f"site {pair.name!r}: latent_form='value' compares two points, and {divergence.name} compares densities, which points do "
            "not have. Use a distance as latent_divergence, such as pyro_kd.divergences.wasserstein2, or a function d(p, q, value) "
            "of p.mean and q.mean."
        )
