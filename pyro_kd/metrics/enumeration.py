r"""Exact likelihoods of small discrete programs, by summing out every latent state.

Pyro's own parallel enumeration covers latents that are scalars; here a latent may be a vector of independent discrete
variables (``Bernoulli(...).to_event(1)``), whose states are all combinations. Cost: memory and time proportional to the
number of joint states of all latents, times the number of rows.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

from pyro_kd.errors import PlateMismatchError, UnknownTargetError, UnsupportedDivergenceError, listing, nearest
from pyro_kd.losses.targets import TargetMessenger
from pyro_kd.noise.handlers import RecordNoiseMessenger
from pyro_kd.noise.statements import is_bookkeeping
from pyro_kd.sites.categories import recoded_value
from pyro_kd.sites.observed import check_observed, observed_by
from pyro_kd.sites.pairing import names_in_student
from pyro_kd.sites.tracing import get_trace
from pyro_kd.utils.estimate import Estimate

__all__ = ["marginal_kl", "marginal_log_prob"]


def marginal_log_prob(program: Callable[..., Any], data: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    r"""Exact log-likelihood :math:`\log p(y | x) = \log \sum_z p(y, z | x)` of a program with discrete latents.

    Args:
        program: a Pyro program all of whose latents, given ``data``, are discrete with a finite support. It must
            broadcast over batch dimensions on the left, as for Pyro's parallel enumeration.
        data: values of the target sites y, by name. Sites that the program observes itself count as data too.
        *args, **kwargs: arguments x of the program.

    Returns:
        Tensor with one dimension for each plate that holds all latents: the log-likelihood of each row. A scalar
        where there is no such plate.

    Raises:
        UnknownTargetError: a name in ``data`` is no sample site of the program.
        UnsupportedDivergenceError: a latent cannot be enumerated, or the likelihood depends on what the program draws outside
            of its sample sites.
        PlateMismatchError: the latents lie in different plates, or in one that is subsampled, scaled or masked; or a site has a
            batch dimension without a plate.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd.metrics import marginal_log_prob
        >>> def coins():
        ...     z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.5, 0.5])).to_event(1))
        ...     pyro.sample("y", dist.Bernoulli((z.sum(-1) + 1) / 4))
        >>> marginal_log_prob(coins, {"y": torch.tensor(1.0)}).exp()
        tensor(0.5000)
    """
    conditioned = poutine.condition(program, dict(data))
    with torch.no_grad(), poutine.block():
        with RecordNoiseMessenger(skip=lambda site: True) as noise:  # of the sites: they draw as without it
            plain = get_trace(conditioned, args, kwargs)
        for name in data:
            _require_site(name, plain)
        nesting = max((-dim for site in _sites(plain).values() for dim in _plates(site).values()), default=0)
        _check_plates(plain)
        found = _enumerated(conditioned, nesting, args, kwargs)
        draws = [draw for draws in noise.between.values() for draw in draws]
        if (draws or noise.lost_between) and not torch.equal(found, _enumerated(conditioned, nesting, args, kwargs)):
            found_at = [f"{d.op} at {d.where}" for d in draws] + [f"{d.op} at {d.where}" for d in noise.lost_between]
            places = ", ".join(dict.fromkeys(found_at))
            raise UnsupportedDivergenceError(
                f"the program draws outside of its sample sites ({places}), and its likelihood depends on that: an exact likelihood "
                "sums over sample sites alone. Make the draw a site: pyro.sample('name', ...), of a law that can be enumerated."
            )
        return found


def _enumerated(program: Callable[..., Any], nesting: int, args: Any, kwargs: Any) -> Tensor:
    """The log-likelihood, summed over the states of all latents."""
    with _EnumerateMessenger(first_dim=-1 - nesting):
        trace = get_trace(program, args, kwargs)
    return _contract(trace, nesting)


def marginal_kl(
    student: Callable[..., Any],
    teacher: Callable[..., Any],
    targets: Collection[str] | str,
    *args: Any,
    site_map: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Estimate:
    r"""KL between the target laws, :math:`KL(p_\phi(y|x) \| p_\theta(y|x))`, with exact likelihoods of both programs.

    The expectation is over the rows of one run of the teacher, so that more rows make the error smaller. Sites that the programs
    observe themselves and that are no targets are inputs x, and have no term.

    Args:
        student, teacher: programs whose latents can be enumerated, see :func:`marginal_log_prob`.
        targets: names of the target sites, in the teacher's naming.
        *args, **kwargs: arguments of both programs.
        site_map: student's site name -> teacher's, where they differ.

    Returns:
        The estimate in nats a row, with its standard error over rows.

    Raises:
        ObservedValueError: an observed value depends on parameters or draws, or differs between the programs.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    with torch.no_grad(), poutine.block(), TargetMessenger(targets) as finder:
        drawn = get_trace(teacher, args, kwargs)
    for name in targets:
        _require_site(name, drawn)
    data: dict[str, Any] = {name: drawn.nodes[name]["value"] for name in targets}
    to_student = names_in_student(site_map or {})
    with torch.random.fork_rng(), torch.no_grad(), poutine.block():
        own: Any = get_trace(student, args, kwargs).nodes
    student_data = {to_student.get(name, name): value for name, value in data.items()}
    for name in targets:
        twin = to_student.get(name, name)
        if twin in own:  # a category is given in the student's coding
            student_data[twin] = recoded_value(data[name], drawn.nodes[name]["fn"], own[twin]["fn"])
    log_p = marginal_log_prob(_without_inputs(teacher, data), data, *args, **kwargs)
    log_q = marginal_log_prob(_without_inputs(student, student_data), student_data, *args, **kwargs)
    observed = {
        name: value for site in own.values() if site["type"] == "sample" for name, value in observed_by(site).items()
    }
    check_observed(observed, finder.observed, to_student, (args, kwargs))
    return Estimate.of((log_p - log_q).flatten().double())


def _without_inputs(program: Callable[..., Any], data: Collection[str]) -> Callable[..., Any]:
    """The program, whose own observations that are not in ``data`` have no density."""

    def is_input(site: Any) -> bool:
        observed = site["type"] == "sample" and site["is_observed"] and not is_bookkeeping(site)
        return bool(observed and site["name"] not in data)

    hidden: Callable[..., Any] = poutine.block(program, hide_fn=is_input)
    return hidden


class _EnumerateMessenger(Messenger):
    """Give each latent all its values at once, along a new batch dimension on the left."""

    def __init__(self, first_dim: int) -> None:
        super().__init__()
        self.next_dim = first_dim

    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] or msg["done"] or msg["value"] is not None or site_is_subsample(msg):
            return
        states = _event_states(msg["fn"], str(msg["name"]))
        shape = (len(states), *(1,) * (-self.next_dim - 1), *states.shape[1:])
        msg["value"] = states.reshape(shape)
        self.next_dim -= 1


def _event_states(fn: Any, name: str) -> Tensor:
    """All values of one event of a discrete distribution: shape (number of states, *event_shape)."""
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


def _check_plates(trace: Trace) -> None:
    """Raise where a site has a batch dimension that no plate declares: it would be taken for one of enumerated states."""
    for name, site in _sites(trace).items():
        shape = site["fn"].batch_shape
        dims = {-i - 1 for i, size in enumerate(reversed(shape)) if size > 1}
        if not dims <= set(_plates(site).values()):
            raise PlateMismatchError(
                f"site {name!r} has batch shape {tuple(shape)} and the plates {listing(_plates(site)) or 'none'}. Put it into a "
                "pyro.plate for each batch dimension, or call .to_event on its distribution."
            )


def _contract(trace: Trace, nesting: int) -> Tensor:
    """Sum the log densities over targets and rows, and log-sum-exp over the enumerated dimensions."""
    sites = _sites(trace)
    latents = [site for site in sites.values() if not site["is_observed"]]
    holders = [set(_plates(site)) for site in latents or sites.values()]
    common = set.intersection(*holders) if holders else set()
    for name, site in sites.items():
        if not _is_one(site["scale"]) or (not site["is_observed"] and (site["mask"] is not None or _is_masked(site["fn"]))):
            raise PlateMismatchError(
                f"site {name!r} is subsampled, scaled or masked, and has no likelihood of its own. Evaluate the program on all "
                "rows, without poutine.scale, and without a mask on its latents."
            )
        if (not site["is_observed"] and set(_plates(site)) != common) or not common <= set(_plates(site)):
            raise PlateMismatchError(
                f"site {name!r} lies in the plates {listing(_plates(site))}, and every site must lie in {listing(sorted(common))}, "
                "the latents in no others. For other programs use pyro.infer.TraceEnum_ELBO."
            )
    kept = {dim for site in sites.values() for plate, dim in _plates(site).items() if plate in common}
    total = torch.zeros(())
    for site in sites.values():
        log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
        inner = [dim for dim in _plates(site).values() if dim not in kept and -dim <= log_prob.dim()]
        if inner:
            log_prob = log_prob.sum(inner, keepdim=True)
        total = total + log_prob
    total = total[(None,) * max(nesting - total.dim(), 0)]
    total = total.flatten(0, total.dim() - nesting - 1).logsumexp(0) if total.dim() > nesting else total
    return total.squeeze([dim for dim in range(-nesting, 0) if dim not in kept]) if nesting else total


def _require_site(name: str, trace: Trace) -> None:
    sites = _sites(trace)
    if name not in sites:
        raise UnknownTargetError(
            f"{name!r} is no sample site of the program; it has {listing(sites)}.{nearest(name, sites)}"
        )


def _is_one(scale: Any) -> bool:
    return bool(torch.as_tensor(scale == 1).all())


def _is_masked(fn: Any) -> bool:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return isinstance(fn, dist.MaskedDistribution)


def _sites(trace: Trace) -> dict[str, Any]:
    """Sample sites; ``pyro.deterministic`` has no density of its own."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not (site["infer"] or {}).get("_deterministic")
    }


def _plates(site: Any) -> dict[str, int]:
    return {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
