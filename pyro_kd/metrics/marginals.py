"""The exact law of the targets of small discrete programs, and the KL between those of two programs.

The latents are summed out by :mod:`pyro_kd.metrics.enumeration`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_kd.errors import UnsupportedDivergenceError
from pyro_kd.losses.targets import TargetMessenger
from pyro_kd.metrics.enumeration import (
    check_plates,
    enumerated_log_prob,
    require_site,
    sample_sites,
    vectorized_plates,
)
from pyro_kd.noise.messengers import RecordNoiseMessenger
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
        program: a Pyro program. Given ``data``, all its latents must be discrete with a finite support. It must
            broadcast over batch dimensions on the left, as for Pyro's parallel enumeration.
        data: values of the target sites y by name, each of shape ``batch_shape + event_shape``. Sites that the program itself
            observes count as data too.
        *args, **kwargs: arguments x of the program.

    Returns:
        The log-likelihood of each row: a tensor with one dimension for each plate that holds all latents, so a scalar
        without such plates.

    Raises:
        UnknownTargetError: a name in ``data`` is not a sample site of the program.
        UnsupportedDivergenceError: a latent cannot be enumerated, or the likelihood depends on draws outside of sample sites.
        PlateMismatchError: latents lie in different plates, or in one that is subsampled, scaled or masked; or a site has a
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
        with RecordNoiseMessenger(skip=lambda site: True) as noise:  # records draws between the sites only
            plain = get_trace(conditioned, args, kwargs)
        for name in data:
            require_site(name, plain)
        nesting = max((-dim for site in sample_sites(plain).values() for dim in vectorized_plates(site).values()), default=0)
        check_plates(plain)
        found = enumerated_log_prob(conditioned, nesting, args, kwargs)
        draws = [draw for draws in noise.between.values() for draw in draws]
        if (draws or noise.lost_between) and not torch.equal(found, enumerated_log_prob(conditioned, nesting, args, kwargs)):
            found_at = [f"{d.op} at {d.where}" for d in draws] + [f"{d.op} at {d.where}" for d in noise.lost_between]
            places = ", ".join(dict.fromkeys(found_at))
            raise UnsupportedDivergenceError(
                f"the program draws outside of its sample sites ({places}), and its likelihood depends on that: an exact likelihood "
                "sums over sample sites alone. Make the draw a site: pyro.sample('name', ...), of a law that can be enumerated."
            )
        return found


def marginal_kl(
    student: Callable[..., Any],
    teacher: Callable[..., Any],
    targets: Collection[str] | str,
    *args: Any,
    site_map: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Estimate:
    r"""KL between the target laws, :math:`KL(p_\phi(y|x) \| p_\theta(y|x))`, with exact likelihoods of both programs.

    The expectation is over the rows of one run of the teacher, so more rows make the error smaller. Sites that the programs
    observe and that are not targets are inputs x and have no term.

    Args:
        student, teacher: programs whose latents can be enumerated; see :func:`marginal_log_prob`.
        targets: names of the target sites, in the teacher's naming.
        *args, **kwargs: arguments of both programs.
        site_map: student's site name -> teacher's, where they differ.

    Returns:
        The estimate in nats per row, with its standard error over rows.

    Raises:
        ObservedValueError: an observed value depends on parameters or draws, or differs between the programs.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    with torch.no_grad(), poutine.block(), TargetMessenger(targets) as finder:
        drawn = get_trace(teacher, args, kwargs)
    for name in targets:
        require_site(name, drawn)
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
    """The program without the densities of what it observes itself and ``data`` does not name."""

    def is_input(site: Any) -> bool:
        observed = site["type"] == "sample" and site["is_observed"] and not is_bookkeeping(site)
        return bool(observed and site["name"] not in data)

    hidden: Callable[..., Any] = poutine.block(program, hide_fn=is_input)
    return hidden
