"""What a user may pass as ``discrete_gradient``, and what it means at a site. Knows names and distributions, and no runs."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.distributions import Distribution

from pyro_kd.errors import UnknownTargetError, UnsupportedGradientError, listing, nearest
from pyro_kd.noise.implicit import implicit
from pyro_kd.noise.samplers import has_derivative, unwrapped
from pyro_kd.utils.user_code import called

__all__ = ["DiscreteGradient", "DiscreteGradients", "unsupported"]

DiscreteGradient = str | Mapping[str, str] | Callable[[str], str]

_KINDS = ("cut", "implicit", "boundary", "boundary_all", "score")


class DiscreteGradients:
    """The gradients that pass through the student's discrete latents.

    Args:
        option: one of ``"cut"``, ``"implicit"``, ``"boundary"``, ``"boundary_all"`` and ``"score"``, a mapping of the teacher's
            site names to these, or a function of the site name. Sites that a mapping does not name are cut.
        site_map: student's site name -> teacher's, where they differ.

    Raises:
        ValueError: there is no such gradient.
    """

    def __init__(self, option: DiscreteGradient, site_map: Mapping[str, str]) -> None:
        self.option = option
        self.site_map = site_map
        for kind in self._possible() or ():
            _check(kind, "")

    def _possible(self) -> Collection[Any] | None:
        """What the option may be at a site; None if that is not known beforehand."""
        if callable(self.option):
            return None
        return self.option.values() if isinstance(self.option, Mapping) else [self.option]

    def may_be(self, *kinds: str) -> bool:
        """Whether some site may have one of these gradients."""
        possible = self._possible()
        return possible is None or any(kind in possible for kind in kinds)

    def at(self, name: str, fn: Any) -> str:
        """The gradient at a site of the student; ``"cut"`` for a site whose draw has a derivative of its own.

        Args:
            name: the student's name of the site.
            fn: its distribution.
        """
        if not isinstance(fn, Distribution) or has_derivative(fn):
            return "cut"
        name = self.site_map.get(name, name)
        if isinstance(self.option, Mapping):
            return self.option.get(name, "cut")
        if not callable(self.option):
            return self.option
        kind = called(self.option, f"site {name!r}: discrete_gradient", "f(site_name)", name)
        _check(kind, f" of site {name!r}")
        return kind

    def cuts(self, name: str, fn: Any) -> bool:
        """Whether no gradient passes through the student's draws at a site, by the student's name."""
        return not has_derivative(fn) and self.at(name, fn) == "cut"

    def sampled(self, name: str, fn: Any) -> Any:
        """The distribution that the student draws from at a site: one with a derivative, if the site has an implicit gradient.

        Raises:
            UnsupportedGradientError: the family has none.
        """
        if not torch.is_grad_enabled() or self.at(name, fn) != "implicit":
            return fn
        try:
            return implicit(fn)
        except UnsupportedGradientError as error:
            raise unsupported(name, fn, "implicit", error.message) from error

    def check_names(self, sites: Collection[str]) -> None:
        """Raise UnknownTargetError if a mapping names a site that does not exist.

        Args:
            sites: the teacher's names of all sites.
        """
        for name in self.option if isinstance(self.option, Mapping) else ():
            if name not in sites:
                raise UnknownTargetError(
                    f"discrete_gradient has an entry for {name!r}, which is not a latent site: these are {listing(sites)}."
                    f"{nearest(name, sites)} Use the teacher's name of the site."
                )


def _check(kind: Any, where: str) -> None:
    if kind not in _KINDS:
        raise ValueError(f"discrete_gradient{where} is {kind!r:.60}, but must be one of {listing(_KINDS)}")


def unsupported(name: str, fn: Any, kind: str, reason: str) -> UnsupportedGradientError:
    """The error if a site does not have the gradient that is asked for."""
    return UnsupportedGradientError(
        f"site {name!r}: {type(unwrapped(fn)).__name__} has no gradient {kind!r}: {reason}. Choose a different one for this site, "
        f"such as discrete_gradient=lambda site: 'cut' if site == {name!r} else {kind!r}, or make the site a target. "
        "docs/discrete_gradients.md lists which family has which."
    )
