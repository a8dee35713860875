r"""The batch as its own samples: the targets of each row under the latents of K rows of the batch.

The latents of all rows are independent samples. So where the distributions of the targets depend on the latents of their row alone,
one run of B rows gives each row K samples: its own latents and those of the K - 1 rows before it.
:mod:`pyro_kd.losses.row_exchange` says where that is so.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_kd.losses.densities import log_density_at
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.losses.rows import scores_of, summed, targets_of

__all__ = ["Shifts", "batch_densities"]

MAX_ELEMENTS = 2**24
"""How many elements of a target's values are scored at once by default."""


class Shifts(NamedTuple):
    """Which rows score which.

    Attributes:
        dim: the batch dimension of the rows.
        num_rows: their number B.
        num_samples: the number K of samples of each row, at most B.
    """

    dim: int
    num_rows: int
    num_samples: int

    def values(self, value: Tensor, event_dim: int, samples: Tensor) -> Tensor:
        """Values so moved along the rows that each row meets the latents of a row before it.

        Args:
            value: of shape ``batch_shape + event_shape``.
            event_dim: length of the event shape.
            samples: numbers k of samples, from 0, of shape (n,): how far to move.

        Returns:
            Tensor of shape ``(n, *batch_shape, *event_shape)``.
        """
        dim = self.dim - event_dim
        rows = torch.arange(self.num_rows, device=value.device)
        moved = value.movedim(dim, 0)[(rows + samples[:, None]) % self.num_rows]
        return moved.movedim(1, dim)

    def back(self, found: Tensor, dim: int, samples: Tensor) -> Tensor:
        """What was found for moved values, by the rows that the values belong to.

        Args:
            found: of shape ``(n, *rows)``, or ``(1, *rows)`` if it does not depend on the values.
            dim: the dimension of the rows in it, a negative number.
            samples: as for :meth:`values`.
        """
        rows = torch.arange(self.num_rows, device=found.device)
        source = (rows - samples[:, None]) % self.num_rows
        which = torch.arange(len(found), device=found.device)[:, None]
        return found.movedim(dim, 1)[which, source].movedim(1, dim)


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
    targets = targets_of(run)
    largest = max(pair.value.numel() for pair in targets)
    size = max(1, MAX_ELEMENTS // max(largest, 1)) if chunk_size is None else chunk_size
    at = kept.index(shifts.dim) - len(kept)
    samples = torch.arange(shifts.num_samples, device=targets[0].value.device)

    def scored(of: Callable[[Any], Any], chunk: Tensor) -> Tensor:
        total: Any = 0.0
        for pair in targets:
            moved = shifts.values(pair.value, len(pair.p.event_shape), chunk)
            total = total + summed(log_density_at(pair, of(pair), moved), kept, lead=1)
        return shifts.back(total, at, chunk)

    chunks = samples.split(size)
    with torch.no_grad():
        log_p = torch.cat([scored(lambda pair: pair.p, chunk) for chunk in chunks])
    if len(chunks) == 1:
        log_q = scored(lambda pair: pair.q, samples)
    else:
        log_q = torch.cat([_recomputed(scored, lambda pair: pair.q, chunk) for chunk in chunks])
    scores = scores_of(run.student, kept)
    return log_p, log_q, None if scores is None else shifts.back(scores[None], at, samples)


def _recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    found: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return found
