"""Batches for training: an endless stream of arguments, whose position can be saved and restored."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyro_kd.errors import BatchesExhaustedError
from pyro_kd.losses.teacher_draws import TeacherDraw
from pyro_kd.training.processes.sharing import epochs_of
from pyro_kd.utils.display import describe_tensor
from pyro_kd.utils.randomness import RandomState

__all__ = ["BatchStream", "Call", "Place", "as_arguments", "require_batches", "require_tuple", "to_device"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of the programs."""


class Place(NamedTuple):
    """Where a stream of batches stands, and the random generators with it.

    Attributes:
        taken: the number of batches that steps have had in the current epoch.
        epoch_start: the random state at the start of this epoch; None before the first one.
        order: seed and epoch of a DistributedSampler; None where there is no such sampler.
        now: the random state.
    """

    taken: int
    epoch_start: RandomState | None
    order: list[int] | None
    now: RandomState


class BatchStream:
    """The arguments of each step, one after the other.

    A batch that is a mapping gives keyword arguments, a tuple or list gives positional ones, anything else is one argument. An
    iterable that can be restarted (a list, a ``DataLoader``) is restarted for each epoch.

    Args:
        batches: an iterable, or None: then every step has the arguments ``call``.
        call: arguments of every step, where there are no batches.
        device: where tensors are moved to.

    Raises:
        TypeError: the batches are a single one.
    """

    def __init__(self, batches: Iterable[Any] | None, call: Call, device: Any = None) -> None:
        require_batches(batches, "batches")
        self._source = batches
        self._call = (to_device(call[0], device), to_device(call[1], device))
        self._device = device
        self._iterator: Iterator[Any] | None = None
        self._taken = 0  # in this epoch
        self._epoch_start: RandomState | None = None
        self._pending: Call | None = None
        self._before: Place | None = None  # that of the last step, where batches were taken that no step has had

    def next(self, step: int) -> Call:
        """The arguments of the next step.

        Raises:
            BatchesExhaustedError: there are no more batches.
        """
        if self._source is None:
            return self._call
        if self._pending is not None:
            call, self._pending = self._pending, None
            return call
        for _ in range(2):
            if self._iterator is None:
                self._epoch_start = RandomState.now(generators_of(self._source))
                if (sampler := epochs_of(self._source)) is not None:
                    sampler.set_epoch(sampler.epoch + 1)
                self._iterator = iter(self._source)
                self._taken = 0
            try:
                batch = next(self._iterator)
            except StopIteration:
                if self._iterator is self._source or self._taken == 0:
                    break
                self._iterator = None
                continue
            self._taken += 1
            return self._arguments(batch)
        raise BatchesExhaustedError(
            f"batches ran out at step {step + 1}, after {self._taken} of them. Pass an iterable that can be restarted (a list, a "
            "DataLoader), not a generator; or ask for fewer steps."
        )

    def take(self, step: int, count: int) -> list[Call]:
        """The arguments of each batch of the next step. Where not all can be had, :attr:`place` is the one before them.

        Raises:
            BatchesExhaustedError: there are no more batches.
        """
        if count > 1 and self._before is None and self._source is not None:  # a single one is counted only when it is there
            self._before = self._here()
        calls = [self.next(step) for _ in range(count)]
        self._before = None
        return calls

    def peek(self, step: int) -> Call:
        """The arguments of the next step, which the next call of :meth:`next` returns too."""
        self._before = self._here()
        self._pending = self.next(step)
        return self._pending

    def once(self) -> Iterator[Call]:
        """One pass through the batches, which starts when the first is asked for; without batches, the arguments once."""
        if self._source is None:
            yield self._call
            return
        for batch in self._source:
            yield self._arguments(batch)

    @property
    def generators(self) -> dict[str, torch.Generator]:
        """The random generators that the batches have of their own, by name."""
        return generators_of(self._source)

    @property
    def description(self) -> dict[str, str]:
        """Type and length of the batches, or of the arguments: equal in every process for the same data."""
        if self._source is None:
            return {
                "arguments": ", ".join(
                    [*map(_describe, self._call[0]), *(f"{k}={_describe(v)}" for k, v in self._call[1].items())]
                )
            }
        dataset = getattr(self._source, "dataset", None)
        sizes = {
            "batches": _length(self._source),
            "rows": _length(dataset),
            "batch_size": getattr(self._source, "batch_size", None),
        }
        return {"data": type(self._source).__name__} | {f"data: {k}": str(v) for k, v in sizes.items() if v is not None}

    @property
    def lengths(self) -> dict[str, int | None]:
        """The number of batches, where it is known."""
        return {"batches": _length(self._source)}

    @property
    def is_shared_out(self) -> bool:
        """Whether there are no batches that several processes could take twice, or a sampler shares them out."""
        return self._source is None or _length(self._source) == 1 or epochs_of(self._source) is not None

    @property
    def place(self) -> Place:
        """Where the next step begins."""
        return self._before or self._here()

    def _here(self) -> Place:
        return Place(self._taken, self._epoch_start, self.order, RandomState.now(self.generators))

    @property
    def order(self) -> list[int] | None:
        """Seed and epoch of a DistributedSampler, which decide the order of the rows; None where there is no such sampler."""
        sampler = epochs_of(self._source)
        return None if sampler is None else [getattr(sampler, "seed", 0), sampler.epoch]

    def restore(self, taken: int, epoch_start: RandomState | None, order: list[int] | None = None) -> None:
        """Go to a :class:`Place`, in a stream from which at most one batch was taken. Changes the random state.

        An iterator cannot be restarted: its first ``taken`` batches are skipped.

        Raises:
            BatchesExhaustedError: there are fewer batches than that.
        """
        if self._source is None:
            return
        if self._iterator is self._source:
            if taken == 0:
                return  # what was peeked at is still to come
            taken -= self._taken
        else:
            if (sampler := epochs_of(self._source)) is not None and order is not None:
                sampler.seed = order[0]
                sampler.set_epoch(order[1])
            self._epoch_start, self._iterator, self._taken = epoch_start, None, 0
            if epoch_start is not None:
                epoch_start.restore(self.generators)
                self._iterator = iter(self._source)
        self._pending = self._before = None
        if self._iterator is None:
            return
        for index in range(taken):
            if next(self._iterator, _END) is _END:
                raise BatchesExhaustedError(
                    f"batches ran out after {self._taken} of them, but the checkpoint had taken {self._taken + taken - index}: they "
                    "have changed"
                )
            self._taken += 1

    def _arguments(self, batch: Any) -> Call:
        batch = to_device(batch, self._device)
        if isinstance(batch, Mapping):
            return (), dict(batch)
        return as_arguments(batch), {}


_END = object()


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except TypeError:  # none, or a DataLoader of an IterableDataset
        return None


def _describe(value: Any) -> str:
    """An argument: numbers and names as they are, anything else by its type and size."""
    if isinstance(value, Tensor):
        return describe_tensor(value)
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    length = _length(value)
    return type(value).__name__ + ("" if length is None else f" of {length}")


def as_arguments(value: Any) -> tuple[Any, ...]:
    """Positional arguments: the entries of a tuple or list. Anything else is one argument, as is a packed sequence, a tuple."""
    is_several = isinstance(value, tuple | list) and not isinstance(value, PackedSequence)
    return tuple(value) if is_several else (value,)


def require_batches(batches: Any, what: str) -> None:
    """Raise TypeError where batches are a mapping or a text, whose keys or letters would be taken for batches.

    Args:
        batches: what the user has passed.
        what: as which argument, for the error.
    """
    if isinstance(batches, Mapping):
        raise TypeError(f"{what} is a mapping, whose keys are no batches: pass a list of batches, [{{'x': x}}]")
    if isinstance(batches, str | bytes):
        raise TypeError(f"{what} is the text {batches!r:.60}: pass an iterable of batches, such as a list or a DataLoader")


def require_tuple(made: Any, what: str, example: str) -> tuple[Any, ...]:
    """What a user's function returned as positional arguments.

    Args:
        made: what it returned.
        what: the option that the function ``f`` was passed as, for the error.
        example: a function that would do.

    Raises:
        TypeError: it is no tuple, or a packed sequence, which is a tuple by accident.
    """
    if not isinstance(made, tuple) or isinstance(made, PackedSequence):
        raise TypeError(f"{what}: f returned {type(made).__name__}, and must return a tuple: {example}")
    return made


def generators_of(batches: Any) -> dict[str, torch.Generator]:
    """The random generators of a ``DataLoader`` and its sampler."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    holders = {
        "batches": batches,
        "sampler": getattr(batches, "sampler", None),
        "batch_sampler": batch_sampler,
        "batch_sampler.sampler": getattr(batch_sampler, "sampler", None),
    }
    found = {name: getattr(holder, "generator", None) for name, holder in holders.items()}
    return {name: generator for name, generator in found.items() if isinstance(generator, torch.Generator)}


def to_device(value: Any, device: Any) -> Any:
    """The same value with its tensors on a device, inside tuples, lists and mappings too. None leaves it as it is."""
    if device is None:
        return value
    if isinstance(value, Tensor | PackedSequence | TeacherDraw):  # a packed sequence keeps its lengths on the CPU
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if type(value) in (tuple, list):
        return type(value)(to_device(item, device) for item in value)
    return value
