"""The processes that train together, as torch.distributed connects them, and what it can do between them.

Knows tensors and plain objects, and nothing of training. Every failure of a collective operation is a ProcessGroupError.
"""

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_kd.errors import ProcessGroupError

__all__ = ["Group", "is_launched", "local_rank"]


def is_launched() -> bool:
    """Whether ``torchrun`` has started this process as one of several."""
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank_and_size() -> tuple[int, int]:
    """The number of this process among those that train together, from 0, and how many there are."""
    is_connected = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if is_connected else (0, 1)


class Group:
    """The processes of torch's default process group; this process alone where there is none.

    Attributes:
        rank: the number of this process, from 0.
        size: how many processes there are.
        is_lost: whether the connection to the others is broken.
    """

    def __init__(self) -> None:
        if dist.is_available() and not dist.is_initialized() and is_launched():
            _connect()
        self.rank, self.size = rank_and_size()
        self.is_lost = False

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor of the same shape in every process by its sum over processes, which is the same bits in each."""
        with self._naming_failures("adding up gradients"):
            dist.all_reduce(tensor)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank; anything that can be pickled."""
        found: list[Any] = [None] * self.size
        with self._naming_failures("comparing notes"):
            dist.all_gather_object(found, value)
        return found

    @torch.no_grad()
    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors of the same shapes in every process the values that they have in the first."""
        for tensor in tensors:
            values = tensor.detach().contiguous()
            with self._naming_failures("copying parameters"):
                dist.broadcast(values, 0)
            if values.data_ptr() != tensor.data_ptr():
                tensor.copy_(values)

    @contextmanager
    def _naming_failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.is_lost = True
            reason = str(error).strip().split("\n")[0]
            raise ProcessGroupError(
                f"process {self.rank} of {self.size} lost the others while {what} ({reason:.200}). A process has ended, is busy for "
                "longer than the group's timeout, or has no backend for this device. Look for the first error among all processes; "
                "then start again with fit(..., checkpoints=..., resume=True). Where a process may need longer, or for a backend of "
                "your own: torch.distributed.init_process_group('cpu:gloo,cuda:nccl', timeout=timedelta(hours=1))."
            ) from error


def _connect() -> None:
    """Make the default process group from what ``torchrun`` says."""
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    if not dist.is_gloo_available():
        raise ProcessGroupError(
            "torchrun has started several processes, but this torch has no backend 'gloo' to connect them on a CPU. Install a torch "
            "that has it, or call torch.distributed.init_process_group(...) before training, with a backend that is there."
        )
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo")
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ProcessGroupError(
            f"torchrun has started {os.environ.get('WORLD_SIZE')} processes, which could not be connected at {where} "
            f"({str(error).splitlines()[0]:.200}). Check that all of them run and reach this address."
        ) from error
    atexit.register(_disconnect)


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
