r"""The score-function gradient through discrete latents that share noise.

The loss is :math:`E_\epsilon f(z', z)`, where the teacher's draw z' and the student's draw z are functions of the same noise. So
the score of z is not that of the student's law. With everything drawn before them fixed, the pair has the joint law
:math:`\pi_\theta(z', z)` of :func:`~pyro_kd.noise.steps.log_coupling`, in which only z depends on the student's parameters, and

.. math::
    \nabla_\theta E f = E[\nabla_\theta f] + E\Big[\sum_i \nabla_\theta \log \pi_\theta(z'_i, z_i)\,(f_{>i} - b_i)\Big].

The teacher's law of z' does not depend on :math:`\theta`, so :math:`\nabla \log \pi` is the score of z given z', and has mean 0
given z'. Hence it multiplies only :math:`f_{>i}`, the terms of sites after the i-th, in its own row. The baseline :math:`b_i` is
the mean of :math:`f_{>i}` over the other particles, or, with one particle, over the other rows: both are independent of
:math:`\epsilon_i`.

The estimate is unbiased, except where student and teacher are equal: there the loss has a kink. Near it the variance is large,
since the two disagree rarely, and with a score of :math:`1 / |p - p'|`.

Source: Williams, Simple statistical gradient-following algorithms, 1992; leave-one-out: Kool, van Hoof and Welling, Buy 4 REINFORCE
samples, 2019. The law of a draw given the teacher's is ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_kd.errors import UnsupportedGradientError
from pyro_kd.losses.discrete_gradients.choice import DiscreteGradients, unsupported
from pyro_kd.losses.discrete_gradients.rows import Rows, values_of
from pyro_kd.losses.giving import OwnDraw
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.noise.samplers import unwrapped
from pyro_kd.noise.steps import log_coupling

__all__ = ["score_surrogate"]


class _Scored(NamedTuple):
    """One number per row: the log probability of a draw, and what follows it in the loss."""

    log_prob: Tensor
    cost: Tensor


def score_surrogate(
    runs: Sequence[tuple[PairedRun, Mapping[str, Any]]], gradients: DiscreteGradients, loss: Any
) -> Tensor | None:
    """A scalar tensor whose gradient is the score part of the loss's; None if no site asks for it.

    Args:
        runs: the runs of all particles with the weights of their terms.
        gradients: which site asks for which gradient.
        loss: the loss, for its options.

    Raises:
        UnsupportedGradientError: the joint law of the draws of student and teacher is not known.
    """
    found = [_scored(run, weights, gradients, loss) for run, weights in runs]
    parts = []
    for index, sites in enumerate(found):
        for name, (log_prob, cost) in sites.items():
            others = [other[name].cost for number, other in enumerate(found) if number != index and name in other]
            parts.append((log_prob * (cost - _baseline(cost, others, loss))).sum())
    return torch.stack(parts).sum() / len(runs) if parts else None


def _scored(run: PairedRun, weights: Mapping[str, Any], gradients: DiscreteGradients, loss: Any) -> dict[str, _Scored]:
    names = [name for name, own in run.drawn.items() if gradients.at(name, own.fn) == "score"]
    values = values_of(run, weights, loss) if names else {}
    order = {name: place for place, name in enumerate(run.student.nodes)}
    found = {}
    for name in names:
        rows, own = Rows.after(run.student, [name]), run.drawn[name]
        later = [rows.sum(value) for site, value in values.items() if order[site] > order[name]]
        log_prob = _log_prob(name, own, run, gradients, loss)
        cost = torch.zeros(rows.shape, dtype=log_prob.dtype, device=log_prob.device)
        for value in later:
            cost = cost + value
        found[name] = _Scored(rows.sum(log_prob, log_prob.dim() - len(own.fn.batch_shape)), cost)
    return found


def _log_prob(name: str, own: OwnDraw, run: PairedRun, gradients: DiscreteGradients, loss: Any) -> Tensor:
    """The log probability of the student's draw and the teacher's; of the student's alone at a fresh site."""
    is_fresh = name in loss.fresh and name not in loss.site_map
    if is_fresh or gradients.site_map.get(name, name) not in run.teacher.nodes:
        alone: Tensor = unwrapped(own.fn).log_prob(own.value.detach())
        return alone
    site: Any = run.teacher.nodes[gradients.site_map.get(name, name)]
    try:
        return log_coupling(own.fn, own.value, site["fn"], site["value"])
    except UnsupportedGradientError as error:
        raise unsupported(name, own.fn, "score", error.message) from error


def _baseline(cost: Tensor, others: Sequence[Tensor], loss: Any) -> Tensor:
    """The mean cost of the other particles, or of the other rows."""
    if others:
        return torch.stack(list(others)).mean(0)
    dims = list(range(cost.dim()))
    if loss.vectorize_particles and loss.num_particles > 1 and cost.shape[:1] == (loss.num_particles,):
        dims = [0]
    count = torch.Size([cost.shape[dim] for dim in dims]).numel()
    return (cost.sum(dims, keepdim=True) - cost) / (count - 1) if count > 1 else torch.zeros_like(cost)
