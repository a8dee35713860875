"""Sample sites that never draw: statements of a program that Pyro's traces hold as sample sites all the same."""

from typing import Any

import pyro.distributions as dist
from pyro.poutine.util import site_is_subsample

from pyro_kd.noise.samplers import unwrapped
from pyro_kd.utils.pyro_internals import is_deterministic

__all__ = ["is_bookkeeping", "is_factor", "is_statement"]


def is_bookkeeping(site: Any) -> bool:
    """Whether a sample site is never a draw.

    These are ``pyro.deterministic``, ``pyro.factor``, the indices of a plate, and a Delta that is observed at its own point, which
    ``poutine.reparam`` leaves in place of a site.
    """
    if is_statement(site):
        return True
    fn = unwrapped(site["fn"])
    if isinstance(fn, dist.Delta) and site["is_observed"]:
        return site["value"] is fn.v or bool((fn.v == site["value"]).all())
    return False


def is_statement(site: Any) -> bool:
    """Whether a sample site is a ``pyro.deterministic``, a ``pyro.factor`` or the indices of a plate."""
    if is_deterministic(site) or site_is_subsample(site):
        return True
    return isinstance(unwrapped(site["fn"]), dist.Unit)


def is_factor(site: Any) -> bool:
    """Whether a site of a trace is a ``pyro.factor``."""
    return site["type"] == "sample" and isinstance(unwrapped(site["fn"]), dist.Unit)
