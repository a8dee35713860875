"""Rows of a data loader are shared out among processes."""

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from pyro_kd.training.batches import BatchStream
from pyro_kd.training.processes.sharing import digest_of_rows, epochs_of, share_out
from tests.support.processes import in_processes
from tests.support.shared_training import rows_taken

DATA = TensorDataset(torch.arange(10.0))


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_row_goes_to_one_process_in_each_epoch(shuffle):
    first, second = in_processes(rows_taken, 2, 4, shuffle)
    for mine, theirs in zip(first, second, strict=True):
        assert sorted(mine + theirs) == list(range(16))
    assert (first[0] != first[1]) == shuffle


def test_a_shared_loader_has_the_options_of_the_one_that_was_given():
    def collate(rows):
        return torch.stack([row for (row,) in rows])

    loader = DataLoader(DATA, 3, shuffle=True, collate_fn=collate, drop_last=True, timeout=0)
    shared = share_out(loader, rank=1, size=2, seed=7)
    assert (shared.dataset, shared.batch_size, shared.collate_fn, shared.drop_last) == (DATA, 3, collate, True)
    sampler = shared.sampler
    assert isinstance(sampler, DistributedSampler)
    assert (sampler.rank, sampler.num_replicas, sampler.shuffle, sampler.seed, sampler.drop_last) == (1, 2, True, 7, True)
    assert not share_out(DataLoader(DATA), rank=0, size=2, seed=0).sampler.shuffle


@pytest.mark.parametrize("inner", [SequentialSampler, RandomSampler])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_batch_sampler_of_torch_is_shared_out_as_the_loader_that_has_its_options(inner, drop_last):
    loader = DataLoader(DATA, batch_sampler=BatchSampler(inner(DATA), 3, drop_last))
    plain = DataLoader(DATA, 3, shuffle=inner is RandomSampler, drop_last=drop_last)
    for rank in range(2):
        mine, theirs = (list(share_out(each, rank=rank, size=2, seed=7)) for each in (loader, plain))
        assert repr(mine) == repr(theirs)
        assert len(mine[0][0]) == 3


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Loader(DataLoader):
    pass


@pytest.mark.parametrize(
    "batches",
    [
        [torch.zeros(3)],
        DataLoader(Stream()),
        DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)),
        DataLoader(DATA, sampler=RandomSampler(DATA, num_samples=4)),
        DataLoader(DATA, sampler=[3, 1]),
        DataLoader(DATA, batch_sampler=[[0, 1], [2]]),
        DataLoader(DATA, sampler=SequentialSampler(range(4))),
        DataLoader(DATA, sampler=DistributedSampler(DATA, 2, 0)),
        DataLoader(DATA, batch_sampler=BatchSampler(WeightedRandomSampler([1.0, 0.0], 10), 4, False)),
        DataLoader(DATA, batch_sampler=BatchSampler(DistributedSampler(DATA, 2, 0), 4, False)),
        DataLoader(DATA, batch_sampler=BatchSampler([3, 1], 2, False)),
        Loader(DATA),
    ],
)
def test_what_the_user_has_shared_out_stays(batches):
    assert share_out(batches, rank=0, size=2, seed=0) is batches


def test_rows_of_subsets_are_told_apart():
    def parts(*indices):
        subset = Subset(DATA, *indices)
        return [subset, Subset(subset, [1, 0]), ConcatDataset([DATA, subset])]

    for mine, theirs, same in zip(parts(range(0, 10, 2)), parts(range(1, 10, 2)), parts([0, 2, 4, 6, 8]), strict=True):
        assert digest_of_rows(DataLoader(mine)) != digest_of_rows(DataLoader(theirs))
        assert digest_of_rows(DataLoader(mine)) == digest_of_rows(DataLoader(same)) != ""


def test_the_order_of_a_distributed_sampler_changes_with_the_epoch_and_can_be_restored():
    def stream():
        sampler = DistributedSampler(DATA, 2, 0, shuffle=True)
        return BatchStream(DataLoader(DATA, sampler=sampler), ((), {}))

    def rows(stream, count):
        return [stream.next(0)[0][0].item() for _ in range(count)]

    one, two = stream(), stream()
    first = rows(one, 5)
    begun, place = rows(one, 2), one.place
    assert place.order == [0, 2]
    assert first[:2] != begun or first != begun + rows(one, 3)
    one = stream()
    rows(one, 7)
    two.restore(*place[:3])
    assert rows(two, 8) == rows(one, 8)


def test_a_loader_without_epochs_has_no_order():
    assert epochs_of(DataLoader(DATA, shuffle=True)) is None
    assert BatchStream(None, ((), {})).order is None


def test_a_dataset_of_the_users_is_shared_out():
    class Squares(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return index**2

    assert list(share_out(DataLoader(Squares(), 2), rank=1, size=2, seed=0)) == [pytest.approx(torch.tensor([1, 9]))]
