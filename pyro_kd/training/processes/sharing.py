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
)

from pyro_kd.training.fingerprint import digest_of
from pyro_kd.utils.randomness import keeping_random_state, set_seed
from pyro_kd.utils.tensors import tensors_in

__all__ = ["digest_of_rows", "epochs_of", "share_out"]


def digest_of_rows(batches: Any) -> str:
    """What the first and the last row of a data loader and their number are, as a text; empty for anything else.

    Rows are taken under one seed, so that random changes to them are equal in all processes.
    """
    rows = batches.dataset if type(batches) is DataLoader else None
    if rows is None or isinstance(rows, IterableDataset) or not len(cast(Sized, rows)):
        return ""
    number = len(cast(Sized, rows))
    with keeping_random_state():
        set_seed(0)
        found = [digest_of(tensor) for index in (0, number - 1) for tensor in tensors_in(rows[index])]
    return " ".join([str(number), *found])


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
    if type(batches) is not DataLoader or isinstance(batches.dataset, IterableDataset):
        return batches
    sampler, dataset = batches.sampler, cast(Sized, batches.dataset)
    is_plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(dataset)
    )
    if not is_plain or (batches.batch_sampler is not None and type(batches.batch_sampler) is not BatchSampler):
        return batches
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
