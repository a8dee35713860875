"""Gradients in flat tensors, so that one operation adds up those of many parameters.

In front of the first flat tensor lie a few numbers, the header, which need no operation of their own. A parameter that a process has
not reached counts there with a gradient of 0; one that no process has reached has no gradient, as in a single process. Buffers, such
as batch norm's averages, are those of the first process. Knows tensors, and no processes: sums are made elsewhere.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from pyro_kd.errors import ProcessGroupError

__all__ = ["FlatGradients", "is_overlapping", "is_synchronised"]

_MOST_ELEMENTS = 2**23
"""Of a flat tensor; 32 MiB in float32."""


@dataclass
class _Bucket:
    """Tensors of one type and device that lie in one flat tensor."""

    params: list[Tensor]
    places: list[tuple[dict[str, Any], str, Tensor]]
    size: int = 0

    @property
    def buffers(self) -> list[Tensor]:
        """What is in the places now; what was there at first, where that has another form now."""
        found = [(holder.get(name), first) for holder, name, first in self.places]
        return [now if _can_take_the_place(now, first) else first for now, first in found]


def _can_take_the_place(now: Any, first: Tensor) -> TypeGuard[Tensor]:
    if not isinstance(now, Tensor) or is_overlapping(now):
        return False
    return now.shape == first.shape and now.dtype == first.dtype and now.device == first.device


def is_overlapping(tensor: Tensor) -> bool:
    """Whether elements of a tensor share memory, as those of an expanded one do: it cannot be written to."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def is_synchronised(tensor: Tensor) -> bool:
    """Whether a buffer is that of the first process after each step."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not is_overlapping(tensor)


class FlatGradients:
    """How gradients and buffers lie in flat tensors.

    Args:
        params: what is trained, by name.
        places: where the tensors are that are to be those of the first process, as dictionary and key. Only those of floating-point
            numbers are looked at.
        header: how many numbers the header has.
        is_first: whether this is the first process.
    """

    def __init__(
        self, params: Mapping[str, Tensor], places: Sequence[tuple[dict[str, Any], str]], header: int, is_first: bool
    ) -> None:
        self._names = {tensor: name for name, tensor in params.items()}
        self._order = list(params.values())
        self._header = header
        self._is_first = is_first
        self._device = self._order[0].device
        self._type = torch.float64 if self._order[0].dtype == torch.float64 else torch.float32
        front = _Bucket([], [])
        self._buckets = [front]
        last = {(self._type, self._device): front}
        kept = [(holder, name) for holder, name in places if is_synchronised(holder[name])]
        for tensor, place in [*((p, None) for p in self._order), *((place[0][place[1]], place) for place in kept)]:
            key = tensor.dtype, tensor.device
            bucket = last.get(key)
            if bucket is None or bucket.size + tensor.numel() > _MOST_ELEMENTS:
                bucket = last[key] = _Bucket([], [])
                self._buckets.append(bucket)
            if place is None:
                bucket.params.append(tensor)
            else:
                bucket.places.append((*place, tensor))
            bucket.size += tensor.numel()

    def front(self, header: Sequence[float], *, is_empty: bool = False) -> Tensor:
        """The first flat tensor: the header, a flag for each parameter that has a gradient, gradients, and buffers.

        Args:
            header: its numbers.
            is_empty: whether all after the header is 0.

        Raises:
            ProcessGroupError: a gradient is sparse.
        """
        flags = [0.0 if is_empty else float(param.grad is not None) for param in self._order]
        numbers = torch.tensor([*header, *flags], dtype=self._type).to(self._device)
        if is_empty:
            return torch.cat([numbers, numbers.new_zeros(self._buckets[0].size)])
        return torch.cat([numbers, *self._parts(self._buckets[0])])

    def read(self, front: Tensor) -> tuple[list[float], list[bool]]:
        """The sums of the header, and whether each parameter has a gradient in some process."""
        numbers = front[: self._header + len(self._order)].tolist()
        return numbers[: self._header], [flag > 0 for flag in numbers[self._header :]]

    def rest(self) -> list[Tensor]:
        """The other flat tensors."""
        return [torch.cat([*self._parts(bucket)]) for bucket in self._buckets[1:]]

    @torch.no_grad()
    def put_back(self, front: Tensor, rest: Sequence[Tensor], reached: Sequence[bool], count: int) -> None:
        """Make gradients of the sums over processes: their mean. Buffers become those of the first process.

        Args:
            front, rest: the flat tensors after they were added up.
            reached: whether each parameter has a gradient in some process.
            count: number of processes.
        """
        has_gradient = dict(zip(self._order, reached, strict=True))
        flats = [front[self._header + len(self._order) :], *rest]
        for bucket, flat in zip(self._buckets, flats, strict=True):
            flat[: sum(tensor.numel() for tensor in bucket.params)].div_(count)
            buffers = bucket.buffers
            tensors = [*bucket.params, *buffers]
            parts = flat.split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(bucket.params, parts, strict=False):
                if has_gradient[tensor]:  # the flat tensor is of this step alone, so that a gradient may lie in it
                    values = part.view(tensor.shape)
                    tensor.grad = values if tensor.is_contiguous() else torch.empty_like(tensor).copy_(values)
            for tensor, part in zip(buffers, parts[len(bucket.params) :], strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _parts(self, bucket: _Bucket) -> Iterator[Tensor]:
        for param in bucket.params:
            grad = param.grad
            if grad is None:
                yield param.detach().new_zeros(param.numel())
            elif grad.layout != torch.strided:
                raise ProcessGroupError(
                    f"parameter {self._names[param]!r} has a sparse gradient, which several processes cannot add up: use "
                    "nn.Embedding(..., sparse=False)."
                )
            else:
                yield grad.detach().reshape(-1)
        for buffer in bucket.buffers:
            flat = buffer.detach().reshape(-1)
            yield flat if self._is_first else torch.zeros_like(flat)
