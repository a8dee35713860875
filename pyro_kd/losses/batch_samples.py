r"""The batch as its own samples: the targets of each row under the latents of K rows of the batch.

The latents of all rows are independent samples. So where the distributions of the targets depend on the latents of their row alone,
one run of B rows gives each row K samples: its own latents and those of the K - 1 rows before it.
:mod:`pyro_kd.losses.row_exchange` says where that is so.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_kd.losses.densities import log_density_at
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.losses.rows import scores_of, summed, targets_of
from pyro_kd.sites.pairing import SitePair

__all__ = ["Moves", "Shifts", "batch_densities", "moved_densities"]

MAX_ELEMENTS = 2**24
"""How many elements of a target's values are scored at once by default."""


class Moves(Protocol):
    """Which rows of a batch score which: how values move along the rows."""

    @property
    def dim(self) -> int:
        """The batch dimension of the rows."""

    def values(self, value: Tensor, event_dim: int, samples: Tensor) -> Tensor:
        """Values moved along the rows, so that each row meets the latents of other rows.

        Args:
            value: of shape ``batch_shape + event_shape``.
            event_dim: length of the event shape.
            samples: numbers of moves, of shape (n,).

        Returns:
            Tensor of shape ``(n, *batch_shape, *event_shape)``.
        """

    def back(self, found: Tensor, dim: int, samples: Tensor) -> Tensor:
        """What was found for moved values, by the rows that the values belong to.

        Args:
            found: of shape ``(n, *rows)``.
            dim: the dimension of the rows in it, a negative number.
            samples: as for :meth:`values`.

        Returns:
            Tensor of the same shape: entries along the first dimension are the samples of a row.
        """


class Shifts(NamedTuple):
    """Move in a cycle: sample k of a row has the latents of the row k rows before it, and sample 0 its own.

    Attributes:
        dim: the batch dimension of the rows.
        num_rows: their number B.
        num_samples: the number K of samples of each row, at most B.
    """

    dim: int
    num_rows: int
    num_samples: int

    def values(self, value: Tensor, event_dim: int, samples: Tensor) -> Tensor:
        """Move each value to the row k rows before its own; see :class:`Moves`."""
        dim = self.dim - event_dim
        return value.movedim(dim, 0)[self._rows(samples)].movedim(1, dim)

    def back(self, found: Tensor, dim: int, samples: Tensor) -> Tensor:
        """Move what was found k rows further, to the row of the value; see :class:`Moves`."""
        which = torch.arange(len(found), device=found.device)[:, None]  # of length 1 if it does not depend on the values
        return found.movedim(dim, 1)[which, self._rows(-samples)].movedim(1, dim)

    def _rows(self, samples: Tensor) -> Tensor:
        """The rows that are k rows after each row, of shape (n, B)."""
        return (torch.arange(self.num_rows, device=samples.device) + samples[:, None]) % self.num_rows


def batch_densities(
    run: PairedRun, shifts: Shifts, kept: Sequence[int], chunk_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log densities of the targets of each row under each of its samples.

    Args:
        run: a run of both programs.
        shifts: which rows score which.
        kept: the dimensions of rows, ``shifts.dim`` among them, from the left to the right.
        chunk_size: the number of samples to score at once; the others' densities are computed again in the backward pass. None for as
            many as keep the values of a target below :data:`MAX_ELEMENTS` elements.

    Returns:
        The teacher's and the student's log densities, and the student's scores or None, each of shape ``(K, *rows)``.
    """
    samples = torch.arange(shifts.num_samples, device=run.pairs[0].value.device)
    with torch.no_grad():
        log_p = moved_densities(run, shifts, kept, samples, chunk_size, lambda pair: pair.p)
    log_q = moved_densities(run, shifts, kept, samples, chunk_size, lambda pair: pair.q)
    scores = scores_of(run.student, kept)
    return log_p, log_q, None if scores is None else shifts.back(scores[None], kept.index(shifts.dim) - len(kept), samples)


def moved_densities(
    run: PairedRun,
    moves: Moves,
    kept: Sequence[int],
    samples: Tensor,
    chunk_size: int | None,
    of: Callable[[SitePair], Any],
    still: Collection[str] = (),
) -> Tensor:
    """Log densities of the targets of each row under the latents of other rows, for one of the programs.

    Args:
        run, kept, chunk_size: as for :func:`batch_densities`.
        moves: which rows score which.
        samples: numbers of moves, of shape (n,).
        of: chooses the distribution of a pair.
        still: targets whose distributions belong to their rows, and not to latents.

    Returns:
        Tensor of shape ``(n, *rows)``.
    """
    targets = targets_of(run)
    moving = [pair for pair in targets if pair.name not in still]
    staying = [summed(log_density_at(pair, of(pair), pair.value), kept) for pair in targets if pair.name in still]
    largest = max([1, *(pair.value.numel() for pair in moving)])
    size = max(1, MAX_ELEMENTS // largest) if chunk_size is None else chunk_size

    def scored(chunk: Tensor) -> Tensor:
        total: Any = 0.0
        for pair in moving:
            moved = moves.values(pair.value, len(pair.p.event_shape), chunk)
            total = total + summed(log_density_at(pair, of(pair), moved), kept, lead=1)
        return cast(Tensor, total)

    found: Any = 0.0
    if moving:
        chunks = samples.split(size)
        found = scored(samples) if len(chunks) == 1 else torch.cat([_recomputed(scored, chunk) for chunk in chunks])
        found = moves.back(found, kept.index(moves.dim) - len(kept), samples)
    for each in staying:
        found = found + each.expand(len(samples), *each.shape)
    return cast(Tensor, found)


def _recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    found: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return found
