"""The graphs of a capture: for each key a specialisation, and in it a cache entry for each static state.

Knows keys, static states and graphs, but not how they are made.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_kd.capture.graph import Graph
from pyro_kd.capture.state import Place
from pyro_kd.capture.static_state import StaticState

__all__ = ["Cache", "CacheEntry", "ExtraTensors", "Specialisation"]

_MAX_STALE = 3
"""After this number of changes to tensors whose values its graphs hold, a specialisation gets no more graphs."""

_MAX_LOST = 20
"""After this number of successive calls without a graph, calls are no longer compared with the cache entries item by item."""


@dataclass(slots=True, eq=False)
class CacheEntry:
    """A graph with the conditions that it was made for, or the reason why a run was refused under these conditions.

    Attributes:
        static: everything static that the run depends on.
        graph: the graph; None if the run was refused, or if the graph has ended.
        refusal: why there is no graph; None if one was made.
        ties: pairs of places whose tensors were the same tensor when the graph was made.
        params: names of the ``pyro.param`` statements that the run executed.
        notes: the notes of the run, which are returned with its outputs.
        device: the device of the loss.
        num_calls: how often the graph was called.
        next_validation: the call before which the programs run with every check: the 50th, and when their number has doubled.
        num_misses: in how many of these calls a guard did not hold.
        are_tied: for each of ``ties``, whether the two were the same tensor.
    """

    static: StaticState
    graph: Graph | None = None
    refusal: str | None = None
    ties: list[tuple[Place, Place]] = field(default_factory=list)
    params: Sequence[str] = ()
    notes: Any = None
    device: torch.device | None = None
    num_calls: int = 0
    next_validation: int = 50
    num_misses: int = 0
    are_tied: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.are_tied = self._are_tied()

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the same tensors are tied, and the graph was compiled for inputs of these shapes, dtypes, devices and flags."""
        return self._are_tied() == self.are_tied and self.graph is not None and self.graph.fits(inputs)

    def _are_tied(self) -> list[bool]:
        return [one.tensor() is two.tensor() for one, two in self.ties]


class ExtraTensors:
    """The tensors that a run takes besides the programs' arguments, on the device of the loss. Each set of them is moved once."""

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._given: tuple[Tensor, ...] = ()
        self._moved: tuple[Tensor, ...] = ()

    def on(self, device: torch.device | None, extra: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The given tensors, of any shapes, on a device. None leaves them where they are."""
        if device is None or all(tensor.device == device for tensor in extra):
            return extra
        if self._device != device or tuple(map(id, self._given)) != tuple(map(id, extra)):
            self._device, self._given = device, extra
            self._moved = tuple(tensor.to(device, non_blocking=True) for tensor in extra)
        return self._moved


class Specialisation:
    """The cache entries for one key.

    Args:
        extra: moves extra tensors.
        warn: is called with the reason why there will be no more graphs.

    Attributes:
        entries: the cache entries.
        is_full: whether there will be no more entries.
        num_stale: how many entries have ended because a tensor has changed whose value they hold, such as a frozen teacher's.
    """

    def __init__(self, extra: ExtraTensors, warn: Callable[[str], None]) -> None:
        self.entries: list[CacheEntry] = []
        self.is_full = False
        self.num_stale = 0
        self._num_lost = 0
        self._extra = extra
        self._warn = warn

    def find(self, tensors: Sequence[Tensor], extra: tuple[Tensor, ...]) -> tuple[CacheEntry | None, list[Tensor]]:
        """The entry that fits the current state, with the inputs of its graph; None if a graph must be made.

        Args:
            tensors: the tensors among the arguments, of any shapes.
            extra: the tensors that the run takes besides the arguments, of any shapes.
        """
        for entry in self.entries:
            if entry.static.is_untouched() and (inputs := self._inputs(entry, tensors, extra)) is not None:
                self._num_lost = 0
                return entry, inputs
        if self._num_lost > _MAX_LOST:
            return None, []
        notes = dict[frozenset[str], StaticState]()
        for entry in self.entries:
            if entry.static.is_equal(notes) and (inputs := self._inputs(entry, tensors, extra)) is not None:
                self._num_lost = 0
                return entry, inputs
        self._num_lost += self.is_full
        return None, []

    def _inputs(self, entry: CacheEntry, tensors: Sequence[Tensor], extra: tuple[Tensor, ...]) -> list[Tensor] | None:
        """The current inputs of an entry's graph. The list is empty if it has no graph; None if the graph does not fit them."""
        if entry.graph is None:
            return []
        try:
            inputs = entry.graph.inputs([*tensors, *self._extra.on(entry.device, extra)])
            if not entry.fits(inputs):
                return None
            if entry.graph.is_current():
                return inputs
        except (KeyError, AttributeError):  # a parameter that was there is gone
            return None
        entry.graph = None
        self.entries = [other for other in self.entries if other is not entry]
        self.num_stale += 1
        if self.num_stale > _MAX_STALE:
            self.is_full = True
            self._warn("a tensor that determines shapes or numbers in the programs changes from call to call")
        return None


class Cache:
    """The specialisations of a capture, by key.

    Args:
        max_entries: the maximum number of cache entries, refused ones included.
        warn: is called with the reason why there will be no more graphs.

    Attributes:
        extra: moves extra tensors.
    """

    def __init__(self, max_entries: int, warn: Callable[[str], None]) -> None:
        self.extra = ExtraTensors()
        self._max_entries = max_entries
        self._warn = warn
        self._specialisations: dict[Hashable, Specialisation] = {}

    def get(self, key: Hashable) -> Specialisation | None:
        """The specialisation of a key, created if necessary; None if the cache is full.

        Raises:
            TypeError: the key has no hash.
        """
        found = self._specialisations.get(key)
        if found is None and not self.is_full:
            found = self._specialisations[key] = Specialisation(self.extra, self._warn)
        return found

    @property
    def num_graphs(self) -> int:
        """How many graphs were made, without those that have ended because a tensor has changed."""
        return sum(entry.refusal is None for entry in self._entries())

    @property
    def num_refused(self) -> int:
        """How many runs were refused."""
        return sum(entry.refusal is not None for entry in self._entries())

    @property
    def is_full(self) -> bool:
        """Whether there will be no more entries."""
        return len(self._entries()) >= self._max_entries

    def _entries(self) -> list[CacheEntry]:
        return [entry for specialisation in self._specialisations.values() for entry in specialisation.entries]
