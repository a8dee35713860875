"""A plain run of a program before it is run on all states of its latents: what that needs, and whether it would be right.

Knows one program, and no losses. :mod:`pyro_kd.sites.enumeration` has the enumerated run.
"""

from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance
from pyro.poutine import Trace

from pyro_kd.errors import PlateMismatchError, UnknownTargetError, UnsupportedDivergenceError, listing, nearest
from pyro_kd.noise.messengers import RecordNoiseMessenger
from pyro_kd.noise.point_masses import is_point
from pyro_kd.sites.elimination import Latent, Scope, largest_table
from pyro_kd.sites.enumeration import (
    MAX_STATES,
    Enumerated,
    Program,
    counted_sites,
    density,
    plates_at,
    plates_of,
    sample_sites,
    too_many_states,
)
from pyro_kd.sites.plates import undeclared_dims
from pyro_kd.sites.states import num_states
from pyro_kd.sites.tracing import get_trace
from pyro_kd.utils.advice import advice
from pyro_kd.utils.randomness import keeping_random_state

__all__ = ["Survey", "survey"]

_MOST_DIMS = 60
"""Tensors of torch have at most 64 dimensions. An event takes some, and each latent one."""


@dataclass
class Survey:
    """What a plain run of a program shows.

    Attributes:
        trace: the trace of the run.
        nesting: the number of batch dimensions that its plates take.
        draws: the draws outside of sample sites, as text with their places.
    """

    trace: Trace
    nesting: int
    draws: list[str]

    def check(self, evaluate: Callable[[], Enumerated]) -> None:
        """Check that an enumerated run has the densities of the plain one: rows are independent, and nothing draws between sites.

        Args:
            evaluate: runs the program on all states of its latents.

        Raises:
            UnsupportedDivergenceError: the program draws outside of sample sites, and its densities depend on that.
            PlateMismatchError: the densities of the drawn states are different ones.
        """
        run = evaluate()
        if self.draws:
            if not torch.equal(run.log_marginal([]), evaluate().log_marginal([])):
                raise UnsupportedDivergenceError(
                    f"the program draws outside of its sample sites ({', '.join(self.draws)}), and its likelihood depends on that: "
                    "an exact likelihood sums over sample sites alone. Make the draw a site: pyro.sample('name', ...), of a law that "
                    "can be enumerated."
                )
            return
        for name, factor in run.factors.items():
            plain = density(self.trace.nodes[name])
            found = run.at(factor, self.trace)
            if not torch.allclose(found, plain.expand_as(found), rtol=1e-3, atol=1e-3, equal_nan=True):
                raise PlateMismatchError(
                    f"the density of site {name!r} in a row depends on the latents of other rows, or on how many states are "
                    "evaluated at once: enumerated, it is not what it was on the draws. Exact marginals need rows that are "
                    "independent: no mean over rows, no batch norm in train mode, and operations that broadcast over dimensions on "
                    f"the left; or {advice().rather('MultiSampleKD')}."
                )


def survey(
    program: Program,
    args: Any,
    kwargs: Any,
    *,
    required: Collection[str] = (),
    counted: Container[str] | None = None,
    max_states: int = MAX_STATES,
    given_states: int = 1,
) -> Survey:
    """Run a program once as it is, and check that an enumerated run fits into memory. The random state stays.

    Args:
        program: the program, conditioned on the data.
        args, kwargs: its arguments.
        required: names of sites that it must have.
        counted: the observed sites whose densities count; None for all.
        max_states: the largest number of elements that one table may have.
        given_states: the number of states of the given sites that an enumerated run will have.

    Raises:
        UnknownTargetError: a required site is missing.
        PlateMismatchError: a site has a batch dimension without a plate.
        UnsupportedDivergenceError: a latent cannot be enumerated, or there are too many states.
    """
    with torch.no_grad(), keeping_random_state(), RecordNoiseMessenger(skip=lambda site: True) as noise:
        trace = get_trace(program, args, kwargs)  # the handler records draws between the sites only
    for name in required:
        _require_site(name, trace)
    sites = counted_sites(trace, counted)
    _check_plates(sites)
    plates = plates_of(sites)
    nesting = max((-plate.dim for plate in plates.values()), default=0)
    latents, dim = dict[str, Latent](), -nesting
    for name, site in sites.items():
        if not site["is_observed"] and not is_point(site["fn"]):
            states = num_states(site["fn"], name)
            dim -= 1
            if states > 1:
                latents[name] = Latent(dim, states, frozenset(plates_at(site)))
    if -dim > _MOST_DIMS:
        raise UnsupportedDivergenceError(
            f"the program has {-dim - nesting} latents. Each takes a dimension of torch's tensors, so that at most {_MOST_DIMS} can "
            f"be enumerated. Use vectors of latents, Bernoulli(...).to_event(1), or {advice().rather('MultiSampleKD')}."
        )
    rows = max((prod(plates[p].size for p in plates_at(site)) for site in sites.values()), default=1)
    if prod(latent.states for latent in latents.values()) * rows * given_states > max_states:
        scopes = _scopes(program, args, kwargs, sites, latents)
        joint, size = largest_table(scopes, latents, plates)
        if size * given_states > max_states:
            raise too_many_states(joint, latents, size * given_states, max_states)
    draws = [draw for draws in noise.between.values() for draw in draws]
    found_at = [f"{d.op} at {d.where}" for d in draws] + [str(d) for d in noise.lost_between]
    return Survey(trace, nesting, list(dict.fromkeys(found_at)))


def _scopes(
    program: Program, args: Any, kwargs: Any, sites: Mapping[str, Any], latents: Mapping[str, Latent]
) -> list[Scope]:
    """The latents that the density of each site depends on, and its plates. Where that is not known, all latents before it."""
    try:
        with torch.no_grad(), keeping_random_state(), poutine.block(), TrackProvenance():
            trace = get_trace(program, args, kwargs)
        reached = {name: get_provenance(site["fn"].log_prob(site["value"])) for name, site in sample_sites(trace).items()}
    except Exception:  # provenance is a subclass of Tensor, which not all code takes
        reached = {}
    scopes, before = [], list[str]()
    for name, site in sites.items():
        before += [name] if name in latents else []
        scope = latents.keys() & reached[name] if name in reached else before
        scopes.append((frozenset(scope), frozenset(plates_at(site))))
    return scopes


def _check_plates(sites: Mapping[str, Any]) -> None:
    """Raise PlateMismatchError if a site has a batch dimension without a plate, which would pass for one of enumerated states."""
    for name, site in sites.items():
        shape = site["fn"].batch_shape
        if undeclared_dims(shape, site["cond_indep_stack"]):
            raise PlateMismatchError(
                f"site {name!r} has batch shape {tuple(shape)} and the plates {listing(plates_at(site))}. Put it into a "
                "pyro.plate for each batch dimension, or call .to_event on its distribution."
            )


def _require_site(name: str, trace: Trace) -> None:
    """Raise UnknownTargetError if the program has no sample site of this name."""
    sites = sample_sites(trace)
    if name not in sites:
        raise UnknownTargetError(
            f"{name!r} is not a sample site of the program; it has {listing(sites)}.{nearest(name, sites)}"
        )
