"""Sample sites that never draw: statements of a program that Pyro's traces hold as sample sites all the same."""

from typing import Any

import pyro.distributions as dist
from pyro.poutine.util import site_is_subsample

from pyro_kd.noise.samplers import draws_nothing, unwrapped
from pyro_kd.utils import guards
from pyro_kd.utils.pyro_internals import is_deterministic

__all__ = ["is_bookkeeping", "is_factor", "is_left_by_reparam", "is_statement", "is_whole_plate", "note_whole_plate"]


def is_bookkeeping(site: Any) -> bool:
    """Whether a sample site is never a draw.

    These are ``pyro.deterministic``, ``pyro.factor``, the indices of a plate, and a Delta that is observed at its own point, which
    ``poutine.reparam`` leaves in place of a site.
    """
    if is_statement(site):
        return True
    fn = unwrapped(site["fn"])
    if isinstance(fn, dist.Delta) and site["is_observed"]:
        return site["value"] is fn.v or guards.holds(fn.v == site["value"], "a Delta is observed at its point")
    return False


def is_statement(site: Any) -> bool:
    """Whether a sample site is a ``pyro.deterministic``, a ``pyro.factor`` or the indices of a plate."""
    if is_deterministic(site) or site_is_subsample(site):
        return True
    return isinstance(unwrapped(site["fn"]), dist.Unit)


def is_left_by_reparam(msg: Any) -> bool:
    """Whether a message is that of a point mass without a density, observed at its point: what reparam leaves of a draw."""
    fn = msg["fn"]
    if not (msg["is_observed"] and isinstance(fn, dist.MaskedDistribution) and fn._mask is False) or is_deterministic(msg):
        return False
    point = unwrapped(fn)
    return isinstance(point, dist.Delta) and point.v is msg["value"]


def is_factor(site: Any) -> bool:
    """Whether a site of a trace is a ``pyro.factor``."""
    return site["type"] == "sample" and isinstance(unwrapped(site["fn"]), dist.Unit)


def note_whole_plate(msg: Any) -> None:
    """Mark the message of a plate that will take all rows in order: nothing has chosen them, and the plate does not subsample."""
    if msg["value"] is None and site_is_subsample(msg) and draws_nothing(msg["fn"]):
        msg["infer"]["_pyro_kd_whole"] = True


def is_whole_plate(site: Any) -> bool:
    """Whether a plate is marked as taking all rows in order, so that their numbers need not be read."""
    return "_pyro_kd_whole" in site["infer"]
