"""The sample sites of a trace by their part in a distillation: those that are compared, and those whose values are inputs.

Knows one trace, and no pairs.
"""

from collections.abc import Container, Mapping
from typing import Any

import pyro.distributions as dist
from pyro.poutine import Trace
from torch import Tensor

from pyro_kd.noise.samplers import unwrapped
from pyro_kd.noise.statements import is_bookkeeping, is_statement
from pyro_kd.utils import guards

__all__ = ["compared_sites", "covered_points", "observed_inputs"]


def compared_sites(trace: Trace, named: Container[str] = ()) -> dict[str, Any]:
    """The sample sites of a trace that draw, or that are given a draw of the other program, in execution order.

    Observed inputs, ``pyro.deterministic``, ``pyro.factor`` and plate indices draw nothing and are left out. So is a Delta
    that is a function of an auxiliary draw, since the term of that draw covers it: a Delta with a log density, or one by which
    Pyro's autoguides write a latent.

    Args:
        trace: the trace of a program.
        named: sites that are compared in any case: targets, and those that are given the other program's values.
    """
    return _sorted(trace, named)[0]


def covered_points(trace: Trace, named: Container[str] = ()) -> dict[str, Any]:
    """The sites that :func:`compared_sites` leaves out as functions of an auxiliary draw."""
    return _sorted(trace, named)[1]


def _sorted(trace: Trace, named: Container[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sites that are compared, and the point masses that an auxiliary draw covers."""
    sites, covered, auxiliary = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for name, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        if name not in named:
            if site["is_observed"] or is_statement(site):
                continue
            if isinstance(unwrapped(site["fn"]), dist.Delta) and _is_covered(name, site, auxiliary):
                covered[name] = site
                continue
        if (site["infer"] or {}).get("is_auxiliary"):
            auxiliary[name] = site["value"]
        sites[name] = site
    return sites, covered


def _is_covered(name: str, site: Any, auxiliary: Mapping[str, Tensor]) -> bool:
    """Whether a Delta is a function of an auxiliary draw.

    It is if it has a log density, if Pyro's autoguides have named it so, or if its value is a view of the draw.
    """
    if f"{name}_unconstrained" in auxiliary:
        return True
    if any(draw.startswith("_") and draw.endswith("_latent") for draw in auxiliary):
        return True
    memory = site["value"].untyped_storage().data_ptr()
    if any(draw.untyped_storage().data_ptr() == memory for draw in auxiliary.values()):
        return True
    return not guards.holds(unwrapped(site["fn"]).log_density == 0, "a Delta has no density")


def observed_inputs(trace: Trace) -> dict[str, Any]:
    """The values that a program observes, by site: inputs of both programs. ``pyro.deterministic`` and factors are left out."""
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["is_observed"] and not is_bookkeeping(site)
    }
