"""Batches shared out among processes, by torch's DistributedSampler: each row goes to one process in each epoch.

Knows data loaders, and nothing of training.
"""

import hashlib
from collections.abc import Iterator, Sized
from typing import Any, cast

from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from pyro_kd.training.fingerprint import digest_of

__all__ = ["digest_of_rows", "epochs_of", "share_out"]


def digest_of_rows(batches: Any) -> str:
    """What tells the rows of a data loader from those of another process, as a text; empty where it is not to be shared out.

    That is their number, the tensors of a ``TensorDataset``, and which rows a ``Subset`` takes. Rows of other data sets are not read:
    they may be drawn at random, or open files.
    """
    return " ".join([str(len(batches.dataset)), *_digests(batches.dataset)]) if _is_plain(batches) else ""


def _digests(data: Any) -> Iterator[str]:
    """What is known of the rows of a data set, also within those of torch that are made of others."""
    if type(data) is TensorDataset:
        yield from map(digest_of, data.tensors)
    elif type(data) is Subset:
        yield hashlib.blake2b(repr([*data.indices]).encode()).hexdigest()
        yield from _digests(data.dataset)
    elif type(data) is ConcatDataset:
        for part in data.datasets:
            yield from (str(len(cast(Sized, part))), *_digests(part))


def _sampler_of(batches: Any) -> Any:
    """What decides on the order of the rows: where the user has made the batch sampler, it is in there."""
    return batches.sampler if batches.batch_sampler is None else batches.batch_sampler.sampler


def _is_plain(batches: Any) -> bool:
    """Whether a data loader takes all rows of its data once in each epoch, in their order or shuffled."""
    if type(batches) is not DataLoader or isinstance(batches.dataset, IterableDataset):
        return False
    if batches.batch_sampler is not None and type(batches.batch_sampler) is not BatchSampler:
        return False
    sampler = _sampler_of(batches)
    is_known = type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement)
    return is_known and len(sampler) == len(cast(Sized, batches.dataset))


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
    outer = batches.batch_sampler
    sampler: DistributedSampler[Any] = DistributedSampler(
        batches.dataset,
        num_replicas=size,
        rank=rank,
        shuffle=type(_sampler_of(batches)) is RandomSampler,
        seed=seed,
        drop_last=outer is not None and outer.drop_last,
    )
    options: dict[str, Any] = {"batch_size": batches.batch_size, "sampler": sampler, "drop_last": batches.drop_last}
    if outer is not None and batches.batch_size is None:  # the user has made it
        options = {"batch_sampler": BatchSampler(sampler, outer.batch_size, outer.drop_last)}
    return DataLoader(
        batches.dataset,
        **options,
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
