"""Run a program on all states of its discrete latents at once, and sum them out of its density.

Pyro's parallel enumeration covers scalar latents. Here a latent may also be a vector of independent discrete variables
(``Bernoulli(...).to_event(1)``), whose states are all combinations. Time and memory are proportional to the number of
joint states of all latents, times the number of rows. Knows one program; :mod:`pyro_kd.metrics.marginals` compares two.
"""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

from pyro_kd.errors import PlateMismatchError, UnknownTargetError, UnsupportedDivergenceError, listing, nearest
from pyro_kd.sites.tracing import get_trace
from pyro_kd.utils.pyro_internals import is_deterministic

__all__ = ["check_plates", "enumerated_log_prob", "require_site", "sample_sites", "vectorized_plates"]


def enumerated_log_prob(program: Callable[..., Any], nesting: int, args: Any, kwargs: Any) -> Tensor:
    """The log-likelihood of what the program observes, summed over the states of all latents.

    Args:
        program: the program, conditioned on the data.
        nesting: the number of batch dimensions that its plates take.
        args, kwargs: its arguments.

    Returns:
        Tensor with one dimension for each plate that holds all latents.
    """
    with _EnumerateMessenger(first_dim=-1 - nesting):
        trace = get_trace(program, args, kwargs)
    return _contract(trace, nesting)


class _EnumerateMessenger(Messenger):
    """Gives each latent all its values at once, along a new batch dimension on the left."""

    def __init__(self, first_dim: int) -> None:
        super().__init__()
        self.next_dim = first_dim

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        if msg["is_observed"] or msg["done"] or msg["value"] is not None or site_is_subsample(msg):
            return
        states = _event_states(msg["fn"], str(msg["name"]))
        shape = (len(states), *(1,) * (-self.next_dim - 1), *states.shape[1:])
        msg["value"] = states.reshape(shape)
        self.next_dim -= 1


def _event_states(fn: Any, name: str) -> Tensor:
    """All values of one event of a discrete distribution, of shape ``(number of states, *event_shape)``."""
    base, rank = fn, 0
    while isinstance(base, Independent):
        rank += base.reinterpreted_batch_ndims
        base = base.base_dist
    if not getattr(base, "has_enumerate_support", False):
        raise UnsupportedDivergenceError(
            f"latent site {name!r} is {type(base).__name__}, whose values cannot be enumerated. Use a discrete latent with a "
            "finite support, or put the site into data."
        )
    values = base.enumerate_support(expand=False)
    values = values.reshape(len(values), *base.event_shape)
    copies = base.batch_shape[len(base.batch_shape) - rank :] if rank else torch.Size()
    if copies.numel() == 0:
        return values.new_empty(1, *copies, *base.event_shape)
    grid = torch.cartesian_prod(*[torch.arange(len(values))] * copies.numel()) if copies else torch.arange(len(values))
    return values[grid.reshape(-1, *copies).to(values.device)]


def check_plates(trace: Trace) -> None:
    """Raise PlateMismatchError if a site has a batch dimension without a plate, which would pass for one of enumerated states."""
    for name, site in sample_sites(trace).items():
        shape = site["fn"].batch_shape
        dims = {-i - 1 for i, size in enumerate(reversed(shape)) if size > 1}
        if not dims <= set(vectorized_plates(site).values()):
            raise PlateMismatchError(
                f"site {name!r} has batch shape {tuple(shape)} and the plates {listing(vectorized_plates(site))}. Put it into a "
                "pyro.plate for each batch dimension, or call .to_event on its distribution."
            )


def _contract(trace: Trace, nesting: int) -> Tensor:
    """Sum the log densities over targets and rows, and log-sum-exp over the enumerated dimensions."""
    sites = sample_sites(trace)
    latents = [site for site in sites.values() if not site["is_observed"]]
    holders = [set(vectorized_plates(site)) for site in latents or sites.values()]
    common = set.intersection(*holders) if holders else set()
    for name, site in sites.items():
        plates = set(vectorized_plates(site))
        if not _is_one(site["scale"]) or (not site["is_observed"] and (site["mask"] is not None or _is_masked(site["fn"]))):
            raise PlateMismatchError(
                f"site {name!r} is subsampled, scaled or masked, and has no likelihood of its own. Evaluate the program on all "
                "rows, without poutine.scale, and without a mask on its latents."
            )
        if (not site["is_observed"] and plates != common) or not common <= plates:
            raise PlateMismatchError(
                f"site {name!r} lies in the plates {listing(plates)}. Every site must lie in {listing(sorted(common))}, and "
                "latents in no further plates. For other programs use pyro.infer.TraceEnum_ELBO."
            )
    kept = {dim for site in sites.values() for plate, dim in vectorized_plates(site).items() if plate in common}
    total = torch.zeros(())
    for site in sites.values():
        log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
        inner = [dim for dim in vectorized_plates(site).values() if dim not in kept and -dim <= log_prob.dim()]
        if inner:
            log_prob = log_prob.sum(inner, keepdim=True)
        total = total + log_prob
    total = total[(None,) * max(nesting - total.dim(), 0)]
    total = total.flatten(0, total.dim() - nesting - 1).logsumexp(0) if total.dim() > nesting else total
    return total.squeeze([dim for dim in range(-nesting, 0) if dim not in kept]) if nesting else total


def require_site(name: str, trace: Trace) -> None:
    """Raise UnknownTargetError if the program has no sample site of this name."""
    sites = sample_sites(trace)
    if name not in sites:
        raise UnknownTargetError(
            f"{name!r} is not a sample site of the program; it has {listing(sites)}.{nearest(name, sites)}"
        )


def _is_one(scale: Any) -> bool:
    return bool(torch.as_tensor(scale == 1).all())


def _is_masked(fn: Any) -> bool:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return isinstance(fn, dist.MaskedDistribution)


def sample_sites(trace: Trace) -> dict[str, Any]:
    """The sample sites that have a density of their own, which ``pyro.deterministic`` and plate indices lack."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not is_deterministic(site)
    }


def vectorized_plates(site: Any) -> dict[str, int]:
    """The plates around a site that take a batch dimension, with that dimension counted from the right."""
    return {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
