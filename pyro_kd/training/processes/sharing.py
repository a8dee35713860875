"""Batches shared out among processes, by torch's DistributedSampler: each row goes to one process in each epoch.

Knows data loaders, and nothing of training.
"""

from collections.abc import Sized
from typing import Any, cast

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from pyro_kd.training.fingerprint import digest_of

__all__ = ["digest_of_rows", "epochs_of", "share_out"]


def digest_of_rows(batches: Any) -> str:
    """What tells the rows of a data loader from those of another process, as a text; empty where it is not to be shared out.

    That is their number, and the tensors of a ``TensorDataset``. Rows of other data sets are not read: they may be drawn at random,
    or open files.
    """
    if not _is_plain(batches):
        return ""
    data = batches.dataset
    tensors = data.tensors if type(data) is TensorDataset else ()
    return " ".join([str(len(data)), *map(digest_of, tensors)])


def _is_plain(batches: Any) -> bool:
    """Whether a data loader takes all rows of its data once in each epoch, in their order or shuffled."""
    if type(batches) is not DataLoader or isinstance(batches.dataset, IterableDataset):
        return False
    sampler = batches.sampler
    takes_all = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(cast(Sized, batches.dataset))
    )
    return takes_all and (batches.batch_sampler is None or type(batches.batch_sampler) is BatchSampler)


def share_out(batches: Any, *, rank: int, size: int, seed: int) -> Any:
    """A data loader of the rows of one process.

    Args:
        batches: what the user passes to a fit.
        rank, size: the number of the process, and of processes.
        seed: of the order of the rows, where they are shuffled; the same in every process.

    Returns:
        A loader like the one given, with a ``DistributedSampler``. Where each process is to decide itself what it takes, what was
        given: anything but a ``DataLoader``, one with a sampler of the user's, or one of an ``IterableDataset``.
    """
    if not _is_plain(batches):
        return batches
    sampler = batches.sampler
    return DataLoader(
        batches.dataset,
        batch_size=batches.batch_size,
        sampler=DistributedSampler(
            batches.dataset,
            num_replicas=size,
            rank=rank,
            shuffle=type(sampler) is RandomSampler,
            seed=seed,
            drop_last=batches.drop_last,
        ),
        drop_last=batches.drop_last,
        num_workers=batches.num_workers,
        collate_fn=batches.collate_fn,
        pin_memory=batches.pin_memory,
        timeout=batches.timeout,
        worker_init_fn=batches.worker_init_fn,
        multiprocessing_context=batches.multiprocessing_context,
        generator=batches.generator,
        prefetch_factor=batches.prefetch_factor,
        persistent_workers=batches.persistent_workers,
    )


def epochs_of(batches: Any) -> Any:
    """The sampler whose order depends on the number of the epoch, as that of a DistributedSampler does; None where there is none."""
    outer = getattr(batches, "batch_sampler", None)
    for sampler in (getattr(batches, "sampler", None), getattr(outer, "sampler", None), outer):
        if callable(getattr(sampler, "set_epoch", None)) and hasattr(sampler, "epoch"):
            return sampler
    return None
