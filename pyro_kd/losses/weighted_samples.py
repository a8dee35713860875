r"""The batch as its own samples where some latents depend on their row, by importance weights.

Where inputs x of a row decide on some latents, those of row s follow :math:`p_s(z) = p(z | x_s)`, and not the law :math:`p_r(z)` of
row r. In a block of M rows, the others' latents are one sample from each of :math:`p_s, s \ne r`. Each counts with the weight

.. math:: w_{rs} = \frac{p(y_r | z_s) \, p_r(z_s)}{\bar p_r(z_s)}, \qquad \bar p_r = \frac{1}{M - 1} \sum_{s \ne r} p_s

(the balance heuristic), so that the mean of the weights is an unbiased estimate of :math:`p(y_r)`. At the sites that belong to a
row, densities change with the row; at all others, with the latents. So none needs a further run.
:mod:`pyro_kd.losses.row_exchange` finds these sites.

Source: Veach and Guibas, Optimally Combining Sampling Techniques for Monte Carlo Rendering, SIGGRAPH 1995, for the weights.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_kd.losses.batch_samples import moved_densities
from pyro_kd.losses.densities import log_prob_of_many
from pyro_kd.losses.mixtures import without_value
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.losses.row_exchange import Exchange
from pyro_kd.losses.rows import drawn_sites, scores_of, summed
from pyro_kd.sites.pairing import SitePair
from pyro_kd.sites.weighting import unmask

__all__ = ["Blocks", "log_weights", "weighted_bound"]


class Blocks(NamedTuple):
    """Move within blocks: sample s of a row has the latents of row s of its block.

    Attributes:
        dim: the batch dimension of the rows.
        num_rows: their number B.
        size: the number M of rows of a block, which divides B.
    """

    dim: int
    num_rows: int
    size: int

    def values(self, value: Tensor, event_dim: int, samples: Tensor) -> Tensor:
        """Give all rows of a block the values of row s of the block; see :class:`~pyro_kd.losses.batch_samples.Moves`."""
        dim = self.dim - event_dim
        rows = value.movedim(dim, 0).unflatten(0, (-1, self.size)).transpose(0, 1)
        rows = rows if len(samples) == self.size else rows[samples]
        spread = rows.unsqueeze(2).expand(*rows.shape[:2], self.size, *rows.shape[2:])
        return spread.flatten(1, 2).movedim(1, dim)

    def back(self, found: Tensor, dim: int, samples: Tensor) -> Tensor:
        """Turn what row r has found for row s of its block into what row s has for row r."""
        turned = found.movedim(dim, 1).unflatten(1, (-1, self.size)).transpose(0, 2)
        return turned.flatten(1, 2).movedim(1, dim)

    def is_own(self, like: Tensor, dim: int) -> Tensor:
        """Which sample of a row is the row itself: of the shape of ``like``, ``(M, *rows)``, whose rows are in ``dim``."""
        own = torch.eye(self.size, dtype=torch.bool, device=like.device).repeat(1, self.num_rows // self.size)
        return own.reshape(self.size, *[1] * (like.dim() - 1 + dim), -1, *[1] * (-dim - 1)).expand_as(like)


def weighted_bound(
    run: PairedRun,
    blocks: Blocks,
    kept: Sequence[int],
    chunk_size: int | None,
    exchange: Exchange,
    gradient: str,
    to_student: Mapping[str, str],
) -> Tensor:
    r"""The bound of each row: the teacher's estimate of :math:`\log p_\phi(y_r)` less the student's of :math:`\log p_\theta(y_r)`.

    The student's is the log of the mean weight, whose expectation is too small, by Jensen's inequality. The teacher's is too large:
    the row's own latents are a draw from the posterior, and replace those of a row s that is drawn with probability proportional to
    their density :math:`p_s`. So the difference is a bound. The gradient weighs the student's samples with its own one placed
    likewise, so that it vanishes where student and teacher are equal.

    Args:
        run: a run of both programs.
        blocks: the rows that serve each other.
        kept: the dimensions of rows, from the left to the right.
        chunk_size: as for :func:`~pyro_kd.losses.batch_samples.batch_densities`.
        exchange: which sites belong to their rows.
        gradient: ``"score"`` or ``"cut"``.
        to_student: the student's names of the teacher's sites, where they differ.

    Returns:
        Tensor of shape ``rows``.
    """
    at = kept.index(blocks.dim) - len(kept)
    with torch.no_grad():
        weights, _, log_rows = log_weights(
            run, run.teacher, blocks, kept, chunk_size, exchange.teacher, lambda pair: pair.p, {}
        )
        is_own = blocks.is_own(weights, at)
        chances = log_rows.masked_fill(is_own, -math.inf).softmax(0).cumsum(0)
        chosen = (chances <= torch.rand_like(chances[:1]) * chances[-1:]).sum(0, keepdim=True)
        log_p = _placed(weights, is_own, chosen, -math.inf)
    log_q, log_prior, _ = log_weights(
        run, run.student, blocks, kept, chunk_size, exchange.student, lambda pair: pair.q, to_student
    )
    bound = log_p.logsumexp(0) - log_q.detach().masked_fill(is_own, -math.inf).logsumexp(0)
    if gradient == "cut":
        log_q = log_q - without_value(log_prior)
    placed = _placed(log_q, is_own, chosen, -math.inf)
    trained = -placed.logsumexp(0)
    scores = scores_of(run.student, kept) if gradient == "score" else None
    if scores is not None:
        trained = trained + scores  # of mean 0: the prior's part
    by_latents = scores_of(run.student, kept, without=exchange.student) if gradient == "score" else None
    if by_latents is not None:
        samples = torch.arange(blocks.size, device=by_latents.device)
        theirs = _placed(blocks._replace(dim=at).values(by_latents, 0, samples), is_own, chosen, 0.0)
        trained = trained - (placed.detach().softmax(0) * theirs).sum(0)
    return bound + without_value(trained)


def _placed(found: Tensor, is_own: Tensor, chosen: Tensor, nothing: float) -> Tensor:
    """The entries of a row's samples, with its own in the place of the chosen one; all of shape ``(M, *rows)``.

    Args:
        found: the entries of all rows of the block.
        is_own: which is the row itself.
        chosen: the sample to replace, of shape ``(1, *rows)``.
        nothing: the entry of the row itself.
    """
    own = found.masked_fill(~is_own, 0).sum(0, keepdim=True)
    return found.masked_fill(is_own, nothing).scatter(0, chosen, own)


def log_weights(
    run: PairedRun,
    trace: Trace,
    blocks: Blocks,
    kept: Sequence[int],
    chunk_size: int | None,
    of_rows: Collection[str],
    of: Callable[[SitePair], Any],
    to_own: Mapping[str, str],
) -> tuple[Tensor, Tensor, Tensor]:
    """The log weights of the latents of one program.

    Args:
        run, blocks, kept, chunk_size: as for :func:`weighted_bound`.
        trace: the program's trace.
        of_rows: the sites that belong to their rows, by the program's names.
        of: chooses the program's distribution of a pair.
        to_own: the program's names of the teacher's sites, where they differ.

    Returns:
        Three tensors of shape ``(M, *rows)``, with an entry for each row s of the block of row r: the log of the weight of the
        latents of s; the log of its part p_r / mean of p_s, whose denominator is a constant; and the log density of the latents
        of r under the inputs of s, a constant.
    """
    at = kept.index(blocks.dim) - len(kept)
    samples = torch.arange(blocks.size, device=run.pairs[0].value.device)
    still = [pair.name for pair in run.pairs if to_own.get(pair.name, pair.name) in of_rows]
    log_y = moved_densities(run, blocks, kept, samples, chunk_size, of, still)
    own = torch.zeros_like(log_y)
    for name, site in drawn_sites(trace):
        if name in of_rows:
            fn, _ = unmask(site["fn"], None)
            moved = blocks.values(site["value"], len(fn.event_shape), samples)
            own = own + summed(log_prob_of_many(fn, moved), kept, lead=1)
    log_rows = blocks.back(own.detach(), at, samples)
    mean = blocks.back(_log_of_others(log_rows), at, samples) - math.log(blocks.size - 1)
    log_prior = own - mean
    return log_y + log_prior, log_prior, log_rows


def _log_of_others(logs: Tensor) -> Tensor:
    """For each entry along the first dimension, the log of the sum of all others' exponentials; of the shape of ``logs``.

    Sums are in double precision, since the difference cancels. Others that are less than 1e-30 of the largest entry count as that,
    which makes weights smaller.
    """
    largest = logs.amax(0, keepdim=True)
    parts = (logs - largest).exp()
    others = (parts.sum(0, keepdim=True, dtype=torch.float64) - parts).to(logs.dtype)
    return largest + others.clamp(min=1e-30).log()
