"""Statements of a program that Pyro writes down as sample sites, and that never draw."""

from typing import Any

import pyro.distributions as dist
from pyro.poutine.util import site_is_subsample

from pyro_kd.noise.samplers import draws_nothing, unwrapped
from pyro_kd.utils import guards

__all__ = ["is_bookkeeping", "is_factor", "is_statement", "is_whole_plate", "note_whole_plate"]


def is_bookkeeping(site: Any) -> bool:
    """Whether a sample site is never a draw.

    That is a ``pyro.deterministic``, a ``pyro.factor``, a plate's indices, and a Delta that is observed at its own point:
    ``poutine.reparam`` leaves one in place of the site that it takes apart.
    """
    if is_statement(site):
        return True
    fn = unwrapped(site["fn"])
    if isinstance(fn, dist.Delta) and site["is_observed"]:
        return site["value"] is fn.v or guards.holds(fn.v == site["value"], "a Delta is observed at its point")
    return False


def is_statement(site: Any) -> bool:
    """Whether a sample site is a ``pyro.deterministic``, a ``pyro.factor`` or a plate's indices."""
    if (site["infer"] or {}).get("_deterministic") or site_is_subsample(site):
        return True
    return isinstance(unwrapped(site["fn"]), dist.Unit)


def is_factor(site: Any) -> bool:
    """Whether a site of a trace is a ``pyro.factor``."""
    return site["type"] == "sample" and isinstance(unwrapped(site["fn"]), dist.Unit)


def note_whole_plate(msg: Any) -> None:
    """Note at a plate's message that it will take all rows in order: nothing has chosen them, and it does not subsample."""
    if msg["value"] is None and site_is_subsample(msg) and draws_nothing(msg["fn"]):
        msg["infer"]["_pyro_kd_whole"] = True


def is_whole_plate(site: Any) -> bool:
    """Whether a plate's rows are known to be all of them in order, without a look at their numbers."""
    return "_pyro_kd_whole" in site["infer"]
