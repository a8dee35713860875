"""Run a program on all states of its discrete latents at once.

    program --survey--> Survey --enumerated--> Enumerated --eliminate--> log p(y)

Pyro's parallel enumeration covers scalar latents. Here a latent may also be a vector of independent discrete variables
(``Bernoulli(...).to_event(1)``), whose states are all combinations. Knows one program, and no losses.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_kd.errors import PlateMismatchError, PyroKDError, UnsupportedDivergenceError, listing
from pyro_kd.noise.point_masses import is_point
from pyro_kd.sites.elimination import Factor, Latent, Plate, eliminate, largest_table
from pyro_kd.sites.states import event_states, num_states
from pyro_kd.sites.tracing import get_trace
from pyro_kd.sites.weighting import inner_mask, unmask
from pyro_kd.utils import guards
from pyro_kd.utils.advice import advice
from pyro_kd.utils.pyro_internals import is_deterministic

__all__ = [
    "MAX_STATES",
    "Enumerated",
    "Program",
    "counted_sites",
    "density",
    "enumerated",
    "plates_at",
    "plates_of",
    "sample_sites",
    "too_many_states",
]

Program = Callable[..., Any]

MAX_STATES = 2**24
"""The default limit of the elements of one table, joint states times rows: 64 MiB in single precision."""


@dataclass
class Enumerated:
    """A run of a program on all states of its latents.

    Attributes:
        trace: its trace. Values and distributions have a batch dimension for each latent before those of the plates.
        latents: the latents by name.
        plates: the plates by name.
        factors: the log densities by the name of the site, in the program's order.
        scale: the factor that ``poutine.scale`` and subsampling give to every site.
        nesting, given: the numbers of batch dimensions for plates, on the right, and for given states, to the left of these.
    """

    trace: Trace
    latents: dict[str, Latent]
    plates: dict[str, Plate]
    factors: dict[str, Factor]
    scale: Any
    nesting: int
    given: int

    @property
    def common_plates(self) -> list[str]:
        """The plates that hold every site, from the outermost dimension."""
        held = [self.plates.keys() & factor.plates for factor in self.factors.values()]
        common = set.intersection(*map(set, held)) if held else set[str]()
        return sorted(common, key=lambda name: self.plates[name].dim)

    def log_marginal(self, keep: Sequence[str], without: Container[str] = ()) -> Tensor:
        """The log density of the observed sites that count, with all latents summed out.

        Args:
            keep: names among ``common_plates``.
            without: observed sites to leave out.

        Returns:
            Tensor of the shape of the given states, then the sizes of the plates in ``keep``.

        Raises:
            PlateMismatchError: the latents cannot be summed out plate by plate.
        """
        factors = [factor for name, factor in self.factors.items() if name not in without]
        return eliminate(factors, self.latents, self.plates, keep, self.nesting, self.given)

    def at(self, factor: Factor, draws: Trace) -> Tensor:
        """A factor at the states that a plain run has drawn, of the batch shape of its site."""
        site: Any
        drawn: Any
        value = factor.value
        for name in factor.latents:
            dim, site, drawn = self.latents[name].dim, self.trace.nodes[name], draws.nodes[name]
            same: Tensor = site["value"] == drawn["value"]
            for _ in site["fn"].event_shape:
                same = same.all(-1)
            value = torch.where(same, value, 0.0).sum(dim, keepdim=True)
        return value


def enumerated(
    program: Program,
    args: Any,
    kwargs: Any,
    *,
    nesting: int,
    given: int = 0,
    counted: Container[str] | None = None,
    max_states: int = MAX_STATES,
    may_scale: bool = False,
) -> Enumerated:
    """Run a program on all states of its latents.

    Args:
        program: the program, conditioned on the data.
        args, kwargs: its arguments.
        nesting: the number of batch dimensions of its plates, see :class:`Survey`.
        given: the number of batch dimensions before these that the data take.
        counted: the observed sites whose densities count; None for all.
        max_states: the largest number of elements that one table may have.
        may_scale: whether all sites may have one scale, which the result then notes instead of applying it.

    Raises:
        UnsupportedDivergenceError: a latent cannot be enumerated, there are too many states, or the program does not broadcast.
        PlateMismatchError: a latent is masked, or a site has a scale that others lack.
    """
    handler = _EnumerateMessenger(-1 - nesting - given, max_states)
    try:
        with handler:
            trace = get_trace(program, args, kwargs)
    except PyroKDError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:  # the survey has just run the program without an error
        raise UnsupportedDivergenceError(
            f"a program does not broadcast over dimensions on the left, which hold the states of its latents "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]}). Write it with operations that broadcast, such as "
            f"x[..., 0] for x[:, 0], and without branches on values; or {advice().rather('MultiSampleKD')}."
        ) from error
    sites = counted_sites(trace, counted)
    scale = _scale(sites, may_scale)
    plates = plates_of(sites)
    latents = {
        name: Latent(dim, states, frozenset(plates_at(sites[name])))
        for name, (dim, states) in handler.found.items()
        if states > 1
    }
    factors = dict[str, Factor]()
    for name, site in sites.items():
        if is_point(site["fn"]) and not site["is_observed"]:
            continue
        value, own = density(site), plates_at(site)
        value = value[(None,) * max(nesting - value.dim(), 0)]
        shape = list(value.shape)
        for plate in own:
            shape[plates[plate].dim] = plates[plate].size
        declared = [plates[plate].dim for plate in own]
        if any(shape[dim] > 1 for dim in range(-nesting, 0) if dim not in declared):
            raise PlateMismatchError(
                f"site {name!r} lies outside of a plate, and its density has a dimension of the plate's rows or of states: it "
                "depends on latents inside. Exact marginals need rows that are independent. Put the site into the plate, or "
                f"{advice().rather('MultiSampleKD')}."
            )
        scope = frozenset(latent for latent, (dim, _, _) in latents.items() if -dim <= value.dim() and value.shape[dim] > 1)
        factors[name] = Factor(value.expand(shape), scope, frozenset(own))
    joint, size = largest_table([(f.latents, f.plates) for f in factors.values()], latents, plates)
    if size > max_states:
        raise too_many_states(joint, latents, size, max_states)
    return Enumerated(trace, latents, plates, factors, scale, nesting, given)


class _EnumerateMessenger(Messenger):
    """Gives each latent all its values at once, along a new batch dimension on the left.

    Attributes:
        found: the dimension and the number of states of each latent, by name.
    """

    def __init__(self, first_dim: int, max_states: int) -> None:
        super().__init__()
        self.found = dict[str, tuple[int, int]]()
        self._next, self._max_states = first_dim, max_states

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        if msg["is_observed"] or msg["done"] or msg["value"] is not None or site_is_subsample(msg) or is_point(msg["fn"]):
            return
        name = str(msg["name"])
        count = num_states(msg["fn"], name)
        if count > self._max_states:
            raise too_many_states([name], {name: Latent(-1, count, frozenset())}, count, self._max_states)
        states = event_states(msg["fn"], name)
        msg["value"] = states.reshape(len(states), *(1,) * (-self._next - 1), *states.shape[1:])
        self.found[name] = self._next, len(states)
        self._next -= 1


def too_many_states(
    joint: Container[str], latents: Mapping[str, Latent], size: float, max_states: int
) -> UnsupportedDivergenceError:
    """The error for a table with more elements than allowed."""
    names = [name for name in latents if name in joint]
    states = float(prod(latents[name].states for name in names))
    return UnsupportedDivergenceError(
        f"the latents {listing(names)} have {states:.3g} joint states, too many to sum over: with rows and given states that is a "
        f"table of {float(size):.3g} numbers, and max_states is {max_states}. Use fewer rows, or raise max_states; or "
        f"{advice().rather('MultiSampleKD, which draws the latents')}."
    )


def density(site: Any) -> Tensor:
    """The log density at a site, without its scale and with its mask, of its batch shape."""
    value: Tensor = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
    return value


def counted_sites(trace: Trace, counted: Container[str] | None) -> dict[str, Any]:
    """The sample sites whose densities count: latents, and the observed sites among ``counted``."""
    return {
        name: site
        for name, site in sample_sites(trace).items()
        if counted is None or not site["is_observed"] or name in counted
    }


def _scale(sites: Mapping[str, Any], may_scale: bool) -> Any:
    """The scale that all sites have. Raises PlateMismatchError where they differ, or a latent is masked."""
    first: Any = next((site["scale"] for site in sites.values()), 1.0) if may_scale else 1.0
    is_number = not isinstance(first, Tensor) or first.numel() == 1
    for name, site in sites.items():
        is_latent = not site["is_observed"]
        _, mask = unmask(site["fn"], site["mask"])
        is_masked = is_latent and (mask is not None or inner_mask(site["fn"]) is not None)
        if is_masked or not is_number or not guards.equal(first, site["scale"], "all sites have one scale"):
            what = "masked, or subsampled or scaled unlike other sites" if may_scale else "subsampled, scaled or masked"
            raise PlateMismatchError(
                f"site {name!r} is {what}, and has no likelihood of its own. Evaluate the program on all "
                "rows, without poutine.scale, and without a mask on its latents."
            )
    return first


def sample_sites(trace: Trace) -> dict[str, Any]:
    """The sample sites that have a density of their own, which ``pyro.deterministic`` and plate indices lack."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not is_deterministic(site)
    }


def plates_at(site: Any) -> list[str]:
    """The names of the plates around a site that take a batch dimension."""
    return [frame.name for frame in site["cond_indep_stack"] if frame.vectorized]


def plates_of(sites: Mapping[str, Any]) -> dict[str, Plate]:
    """The plates of all sites by name. Raises PlateMismatchError for one in two dimensions."""
    found = dict[str, Plate]()
    for name, site in sites.items():
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and found.setdefault(frame.name, Plate(frame.dim, frame.size)).dim != frame.dim:
                raise PlateMismatchError(
                    f"plate {frame.name!r} has dimension {frame.dim} at site {name!r}, and before it {found[frame.name].dim}. "
                    "Declare it: pyro.plate(..., dim=...)."
                )
    return found
