"""The table of all laws, with the random programs on which each is tried."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.support.program_laws.bounds import check_bounds, check_likelihood, check_marginal
from tests.support.program_laws.handlers import check_commutes, check_derivative, check_replay
from tests.support.program_laws.losses import (
    STYLES,
    check_closed_forms,
    check_equal_programs,
    check_gradients,
    check_loss_derivative,
    check_particles,
    check_reparam,
    check_svi,
    check_terms,
)
from tests.support.random_programs import KINDS, pairs, recipes

__all__ = [
    "ANY",
    "BOUNDED",
    "COMPARED",
    "DENSITY",
    "EXACT",
    "FINITE",
    "LAWS",
    "LOCATED",
    "SINCE_LAST_RUN",
    "SMOOTH",
    "Law",
    "one",
]

ANY = list(KINDS)


DENSITY = [name for name, kind in KINDS.items() if kind.density]


COMPARED = [name for name in DENSITY if KINDS[name].fixed_support]


EXACT = [name for name, kind in KINDS.items() if kind.gradient == "exact"]


FINITE = [name for name, kind in KINDS.items() if kind.states is not None]


# Their own densities are NaN at draws that round to a bound, and Pareto's own sampler (of inputs) rounds to values below it.
BOUNDED = [name for name in DENSITY if name not in ("RelaxedOneHotCategorical", "Kumaraswamy", "Pareto")]


LOCATED = ["Affine", "LogNormal", "Normal", "Laplace", "Logistic", "Bernoulli"]


SMOOTH = [
    name for name in COMPARED if KINDS[name].gradient == "exact" or (KINDS[name].gradient == "none" and KINDS[name].discrete)
]


def one(**options):
    return st.tuples(recipes(**options))


@dataclass(frozen=True)
class Law:
    """A law, the programs that it is tried on, and how many of them."""

    check: Callable[..., None]
    programs: Any
    ordinary: int
    slow: int = 400


LAWS = {
    "replay": Law(check_replay, one(kinds=ANY, single=None), 96),
    "replay at the edges": Law(check_replay, one(kinds=BOUNDED, spreads=(10.0, 30.0), single=None), 32),
    "commutes": Law(check_commutes, one(kinds=ANY, single=None), 32),
    "derivative": Law(check_derivative, one(kinds=EXACT), 80),
    "equal programs": Law(check_equal_programs, one(kinds=DENSITY, single=None), 48),
    "equal programs at the edges": Law(check_equal_programs, one(kinds=BOUNDED, spreads=(10.0, 30.0), single=None), 24),
    "terms": Law(check_terms, pairs(kinds=[name for name in COMPARED if name != "Delta"]), 48),
    "closed forms": Law(check_closed_forms, pairs(kinds=COMPARED), 48),
    "gradients": Law(check_gradients, st.builds(lambda a, b, c: (*a, b, c), pairs(kinds=COMPARED), STYLES, STYLES), 48),
    "loss derivative": Law(check_loss_derivative, pairs(kinds=SMOOTH), 48),
    "svi": Law(check_svi, pairs(kinds=COMPARED, single=None), 48),
    "particles": Law(check_particles, pairs(kinds=COMPARED, single=None), 19),
    "bounds": Law(check_bounds, one(kinds=FINITE, small=True), 60),
    "likelihood": Law(check_likelihood, one(kinds=FINITE, small=True), 64),
    "marginal": Law(check_marginal, one(kinds=FINITE, small=True), 64),
    "reparam": Law(check_reparam, one(kinds=LOCATED), 30),
}

SINCE_LAST_RUN: tuple[str, ...] = ()
"""Laws that are newer than the last complete slow run, so that docs/random_programs.md does not count their programs yet."""
