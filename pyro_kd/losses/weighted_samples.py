r"""The batch as its own samples where some latents depend on their row, by importance weights.

Where targets or inputs of a row decide on some latents, those of row s follow :math:`p_s(z) = p(z | y_s)`, and not the law
:math:`p_r(z)` of row r. In a block of M rows, the others' latents are one sample from each of :math:`p_s, s \ne r`. Each counts with
the weight

.. math:: w_{rs} = \frac{p(y_r | z_s) \, p_r(z_s)}{\bar p_r(z_s)}, \qquad \bar p_r = \frac{1}{M - 1} \sum_{s \ne r} p_s

(the balance heuristic), so that the mean of the weights is an unbiased estimate of :math:`p(y_r)`. At the sites that belong to a
row, densities change with the row; at all others, with the latents. So none needs a further run.
:mod:`pyro_kd.losses.row_exchange` finds these sites.

Source: Veach and Guibas, Optimally Combining Sampling Techniques for Monte Carlo Rendering, SIGGRAPH 1995, for the weights.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_kd.losses.batch_samples import Shifts, moved_densities
from pyro_kd.losses.mixtures import log_of_others, without_value
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.losses.row_exchange import Exchange
from pyro_kd.losses.rows import drawn_sites, scores_of, summed
from pyro_kd.sites.pairing import SitePair
from pyro_kd.sites.weighting import unmask

__all__ = ["log_weights", "weighted_bound"]


def weighted_bound(
    run: PairedRun,
    shifts: Shifts,
    kept: Sequence[int],
    chunk_size: int | None,
    exchange: Exchange,
    gradient: str,
    to_student: Mapping[str, str],
) -> Tensor:
    r"""The bound of each row: the teacher's estimate of :math:`\log p_\phi(y_r)` less the student's of :math:`\log p_\theta(y_r)`.

    The student's is the log of the mean weight, whose expectation is too small, by Jensen's inequality. The teacher's is too large:
    the row's own latents are a draw from the posterior, and replace those of a row s that is drawn with probability proportional to
    their density :math:`p_s`. So the difference is a bound.

    Args:
        run: a run of both programs.
        shifts: blocks of rows; all rows of a block serve each other.
        kept: the dimensions of rows, from the left to the right.
        chunk_size: as for :func:`~pyro_kd.losses.batch_samples.batch_densities`.
        exchange: which sites belong to their rows.
        gradient: ``"score"`` or ``"cut"``.
        to_student: the student's names of the teacher's sites, where they differ.

    Returns:
        Tensor of shape ``rows``.
    """
    with torch.no_grad():
        weights, _, log_rows = log_weights(
            run, run.teacher, shifts, kept, chunk_size, exchange.teacher, lambda pair: pair.p, {}
        )
        chances = log_rows[1:].flip(0)  # of the rows before, under which a row's own latents may stand
        chosen = (chances - torch.empty_like(chances).exponential_().log()).argmax(0)
        others = torch.arange(len(chances), device=chances.device).reshape(-1, *[1] * chosen.dim())
        log_p = torch.where(others == chosen, weights[:1], weights[1:])
    log_q, log_prior, _ = log_weights(
        run, run.student, shifts, kept, chunk_size, exchange.student, lambda pair: pair.q, to_student
    )
    log_q, log_prior = log_q[1:], log_prior[1:]
    if gradient == "cut":
        log_q = log_q - without_value(log_prior)
    bound = log_p.logsumexp(0) - log_q.logsumexp(0)
    if gradient == "cut":
        return bound
    baseline = log_prior.detach().softmax(0)
    bound = bound + without_value((baseline * log_prior).sum(0))
    scores = scores_of(run.student, kept, without=exchange.student)
    if scores is None:
        return bound
    samples = torch.arange(1, shifts.block, device=scores.device)
    moved = shifts.back(scores[None], kept.index(shifts.dim) - len(kept), samples)
    return bound - without_value(((log_q.detach().softmax(0) - baseline) * moved).sum(0))


def log_weights(
    run: PairedRun,
    trace: Trace,
    shifts: Shifts,
    kept: Sequence[int],
    chunk_size: int | None,
    of_rows: Collection[str],
    of: Callable[[SitePair], Any],
    to_own: Mapping[str, str],
) -> tuple[Tensor, Tensor, Tensor]:
    """The log weights of the latents of one program.

    Args:
        run, shifts, kept, chunk_size: as for :func:`weighted_bound`.
        trace: the program's trace.
        of_rows: the sites that belong to their rows, by the program's names.
        of: chooses the program's distribution of a pair.
        to_own: the program's names of the teacher's sites, where they differ.

    Returns:
        Three tensors of shape ``(M, *rows)``, whose first entry concerns the row itself, and entry k the row k rows before: the
        log of the weight w; that of its part p_r / mean of p_s, whose denominator is a constant; and the log density of a row's
        latents under the row k rows after it, a constant.
    """
    at = kept.index(shifts.dim) - len(kept)
    samples = torch.arange(shifts.block, device=run.pairs[0].value.device)
    still = [pair.name for pair in run.pairs if to_own.get(pair.name, pair.name) in of_rows]
    log_y = moved_densities(run, shifts, kept, samples, chunk_size, of, still)
    own = torch.zeros_like(log_y)
    for name, site in drawn_sites(trace):
        if name in of_rows:
            fn, _ = unmask(site["fn"], None)
            moved = shifts.values(site["value"], len(fn.event_shape), -samples)
            own = own + summed(fn.log_prob(moved), kept, lead=1)
    log_rows = shifts.back(own.detach(), at, -samples)
    mean = log_of_others(log_rows) - math.log(shifts.block - 1)
    log_prior = own - shifts.back(mean, at, samples)
    return log_y + log_prior, log_prior, log_rows
