"""A run of probabilistic programs that its handlers see once for each kind of arguments; after that only tensors move."""

import contextlib
import logging
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_kd.capture.decisions import Decisions
from pyro_kd.capture.graph import Graph, Outputs, trace
from pyro_kd.capture.late import Late
from pyro_kd.capture.reach import Place, Reach
from pyro_kd.randomness import RandomState

__all__ = ["MAX_GRAPHS", "Capture", "Run"]

MAX_GRAPHS = 8
"""How many graphs one capture keeps; further kinds of arguments run without one."""

_MAX_MISSES = 3
"""After so many calls for which a decision of the captured run did not hold, there are no more."""

logger = logging.getLogger("pyro_kd.capture")


@dataclass(frozen=True, slots=True)
class Run:
    """What the captured code returns.

    Attributes:
        loss: scalar, differentiable.
        details: tensors beside it that the caller wants, without gradients.
        leaves: the tensors that the loss is differentiated by.
        params: names of the ``pyro.param`` statements that the run met.
        notes: what a graph's outputs shall carry along.
    """

    loss: Tensor
    details: Sequence[Tensor] = ()
    leaves: Iterable[Tensor] = ()
    params: Sequence[str] = ()
    notes: Any = None


@dataclass(slots=True, eq=False)
class _Entry:
    """A graph, and what it was captured under besides its inputs: modules, tied tensors, and names in Pyro's store."""

    graph: Graph
    modules: list[nn.Module]
    ties: list[tuple[Place, Place]]
    params: set[str]
    notes: Any
    device: torch.device
    misses: int = 0
    state: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = self._state()

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        return self._state() == self.state and self.graph.fits(inputs)

    def _state(self) -> list[Any]:
        """The modes of modules, the modules in them, and whether tied tensors are."""
        state: list[Any] = [module.training for module in self.modules]
        for module in self.modules:
            state += module._modules.values()
        return state + [one.tensor() is two.tensor() for one, two in self.ties]


@dataclass(slots=True)
class _Kind:
    """The graphs for one kind of arguments; where it is full there will be no more."""

    entries: list[_Entry] = field(default_factory=list)
    is_full: bool = False


class _RefusedError(RuntimeError):
    """A run that must not be captured."""


class Capture:
    """Runs a function of programs' arguments as a graph of tensors.

    Args:
        run: ``f(extra, args, kwargs)`` runs the programs and returns a :class:`Run`.
        modules: whose parameters and buffers the run reaches; those that it calls besides are found.
        what: for messages.
        frozen: returns the tensors that keep their values as long as nobody writes to them: a frozen teacher's.
        options: of ``torch.compile``.
        max_graphs: see :data:`MAX_GRAPHS`.

    The first call for a kind of arguments (shapes, dtypes, devices and flags of tensors, values of everything else; train or
    eval mode of modules; grad mode and autocast) runs the programs three times without an effect on buffers and random
    streams: to set up what they set up, to see what they reach, and to trace. A kind that cannot be captured stays without a
    graph, with a warning that says why.
    """

    def __init__(
        self,
        run: Callable[[tuple[Tensor, ...], tuple[Any, ...], dict[str, Any]], Run],
        modules: Iterable[nn.Module],
        what: str,
        frozen: Callable[[], Collection[Tensor]] = tuple,
        max_graphs: int = MAX_GRAPHS,
        **options: Any,
    ) -> None:
        self._run = run
        self._modules = list(modules)
        self._what = what
        self._frozen = frozen
        self._options = options
        self._max_graphs = max_graphs
        self._kinds: dict[Any, _Kind] = {}
        self._late = Late()
        self._moved: tuple[torch.device, tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
        self.num_graphs = 0
        self._is_full = False

    def __call__(
        self, extra: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any], key: Any = ()
    ) -> Outputs | None:
        """Run the graph for these arguments, made now if need be. None: there is none, or it does not hold here.

        Args:
            extra: tensors that the run takes beside the programs' arguments. They are moved to the device of the loss: once, as long
                as they are the same ones.
            args, kwargs: of the programs.
            key: what else the run depends on; equal keys mean one graph.

        Whether a graph holds is known on a GPU some calls later, since no call waits for it. The gradient of a call for which it did
        not hold is 0.
        """
        self._late.look()
        if _PYRO_STACK and not all(map(_is_harmless, _PYRO_STACK)):
            return None
        leaves, spec = _flatten(args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        try:
            kind_key = (
                key,
                _key(leaves),
                _same(tensors),
                spec,
                torch.is_grad_enabled(),
                _autocast(),
                torch.get_default_dtype(),
            )
            kind = self._kinds.get(kind_key)
        except TypeError:
            self._warn("an argument of the programs, or an option of the loss, is neither a tensor nor hashable")
            return None
        if kind is None:
            if self.num_graphs >= self._max_graphs:
                self._warn_full()
                return None
            kind = self._kinds[kind_key] = _Kind()
        entry, inputs = self._find(kind, tensors, extra)
        if entry is None and not kind.is_full:
            self._capture(kind, extra, leaves, spec)
            entry, inputs = self._find(kind, tensors, extra)
        if entry is None:
            return None
        is_watched = bool(_PYRO_STACK) and any(map(_watches, _PYRO_STACK))
        if is_watched and not entry.params <= pyro.get_param_store()._params.keys():
            return None  # the store was cleared: an ordinary run registers them again
        undo = entry.graph.undo(inputs)
        with _no_autocast(kind_key[-2]) if kind_key[-2] else _NOTHING:
            outputs = entry.graph(inputs, entry.notes)
        if outputs.holds is not None and outputs.holds.device.type != "cpu":
            found = entry
            self._late.add(outputs.holds, lambda holds: self._note(kind, found, holds))
        elif outputs.holds is not None and not outputs.holds:
            undo()
            self._note(kind, entry, False)
            return None
        if is_watched:
            for name in entry.params:  # SVI trains what it sees
                pyro.param(name)
        return outputs

    def _note(self, kind: _Kind, entry: _Entry, holds: bool) -> None:
        """Whether the decisions of a graph held in a call."""
        entry.misses += not holds
        if entry.misses >= _MAX_MISSES and entry in kind.entries:
            kind.entries.remove(entry)
            kind.is_full = True
            self._warn("Pyro or torch decide by the values of tensors, otherwise in one call than in another")

    def _on(self, device: torch.device, extra: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Extra tensors on a device."""
        if all(tensor.device == device for tensor in extra):
            return extra
        if self._moved is None or self._moved[0] != device or tuple(map(id, self._moved[1])) != tuple(map(id, extra)):
            self._moved = device, extra, tuple(tensor.to(device, non_blocking=True) for tensor in extra)
        return self._moved[2]

    def _find(self, kind: _Kind, tensors: list[Tensor], extra: tuple[Tensor, ...]) -> tuple[_Entry | None, list[Tensor]]:
        for entry in kind.entries:
            with contextlib.suppress(KeyError):  # a parameter that the store had is gone
                inputs = entry.graph.inputs([*tensors, *self._on(entry.device, extra)])
                if entry.fits(inputs):
                    return entry, inputs
        return None, []

    def _capture(self, kind: _Kind, extra: tuple[Tensor, ...], leaves: list[Any], spec: Any) -> None:
        if self.num_graphs >= self._max_graphs:
            kind.is_full = True
            self._warn_full()
            return
        numbers = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [*(_as_leaf(leaves[number]) for number in numbers), *extra]

        def call(*given: Tensor) -> Run:
            filled = list(leaves)
            for number, tensor in zip(numbers, given, strict=False):
                filled[number] = tensor
            args, kwargs = (tuple(filled), {}) if spec is None else pytree.tree_unflatten(filled, spec)
            with poutine.block():
                return self._run(tuple(given[len(numbers) :]), args, kwargs)

        before, reach = RandomState.now(), Reach(self._modules)
        try:
            self._look(call, tensors, reach, before)  # in which autoguides are set up, and checks made that are made once
            seen, answers = self._look(call, tensors, reach, before)
            tensors[len(numbers) :] = self._on(seen.loss.device, extra)
            try:
                entry = self._trace(call, tensors, seen, reach, answers)
            except Exception as error:  # whatever tracing meets in a program
                kind.is_full = True
                self._warn(_reason(error))
                logger.debug("%s: capture failed", self._what, exc_info=error)
                return
        finally:
            before.restore()
            reach.restore()
        kind.entries.append(entry)
        self.num_graphs += 1
        logger.info("%s: graph %d, of %d operations", self._what, self.num_graphs, entry.graph.num_operations)

    def _look(
        self, call: Callable[..., Run], tensors: list[Tensor], reach: Reach, before: RandomState
    ) -> tuple[Run, Mapping[Any, Sequence[Any]]]:
        """An ordinary run, with all its checks and without an effect: what it reaches, and the decisions on its way."""
        before.restore()
        with reach, Decisions() as decisions:
            seen = call(*tensors)
        before.restore()
        reach.restore()
        return seen, decisions.answers

    def _trace(
        self, call: Callable[..., Run], tensors: list[Tensor], seen: Run, reach: Reach, answers: Mapping[Any, Sequence[Any]]
    ) -> _Entry:
        def run(*given: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
            again = call(*given)
            return again.loss, again.details

        ids = {id(tensor) for tensor in tensors}
        if reach.reassigned:
            raise _RefusedError(
                f"the program puts another tensor in place of buffer {min(reach.reassigned)!r}: write to it, self.buffer.add_(1)"
            )
        places, ties = reach.places()
        if any(id(place.tensor()) in ids for place in places):
            raise _RefusedError("a parameter of the programs is among their arguments too")
        order = {id(tensor): number for number, tensor in enumerate([*(place.tensor() for place in places), *tensors])}
        leaves = sorted(seen.leaves, key=lambda leaf: order.get(id(leaf), len(order)))  # alike in every process
        places += [Place({"": leaf}, "") for leaf in leaves if id(leaf) not in order]
        modules = list(reach.modules)
        with pyro.validation_enabled(False):  # torch.compile turns it off for good
            graph = trace(run, places, tensors, leaves, answers, self._frozen())
            entry = _Entry(graph, modules, ties, set(seen.params), seen.notes, seen.loss.device)
            graph.compile(tensors, self._options)
            with _no_autocast(_autocast()):
                graph(graph.inputs(tensors))  # compiles
        return entry

    def _warn_full(self) -> None:
        if not self._is_full:
            self._warn(
                f"there are {self.num_graphs} graphs already, for other arguments, or other modes of modules or flags of "
                "parameters. Pass what changes from call to call as a tensor, and batches of one shape "
                "(DataLoader(drop_last=True)); or allow more: compile(max_graphs=...)"
            )
        self._is_full = True

    def _warn(self, reason: str) -> None:
        warnings.warn(f"{self._what} goes on without a graph: {reason}", stacklevel=5)


def _flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """What nested arguments hold, and their structure; None for a plain row of tensors and numbers."""
    if not kwargs and all(isinstance(arg, _PLAIN) for arg in args):
        return list(args), None
    return pytree.tree_flatten((args, kwargs))


_PLAIN = (Tensor, int, float, str, type(None))
_NOTHING = contextlib.nullcontext()


def _key(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """The values of arguments that are no tensors, with their types: True is not 1."""
    return tuple([None if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves])


def _same(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Which arguments are one tensor: a graph of f(x, x) is not one of f(x, y)."""
    ids = [id(tensor) for tensor in tensors]
    return tuple([ids.index(number) for number in ids])


def _as_leaf(tensor: Tensor) -> Tensor:
    """A tensor by which a loss can be differentiated, whatever it was computed from."""
    return tensor if tensor.is_leaf else tensor.detach().requires_grad_()


def _watches(frame: Any) -> bool:
    """Whether a handler is one that collects parameters, as SVI's."""
    return isinstance(frame, TraceMessenger) and frame.param_only


def _is_harmless(frame: Any) -> bool:
    return _watches(frame) or isinstance(frame, BlockMessenger)


def _autocast() -> tuple[Any, ...]:
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


@contextlib.contextmanager
def _no_autocast(kinds: tuple[Any, ...]) -> Iterator[None]:
    """Autocast has had its effect on the graph."""
    with contextlib.ExitStack() as stack:
        for kind, _ in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _reason(error: Exception) -> str:
    """Why a program could not be traced, and what helps."""
    if "get value out of a tracing tensor" in str(error) or "data-dependent" in str(error).lower():
        lines = traceback.extract_tb(error.__traceback__)
        user = [line for line in lines if not any(part in line.filename for part in _INSIDE)]
        where = f" at {Path(user[-1].filename).name}:{user[-1].lineno} ({user[-1].line})" if user else ""
        return (
            f"the program reads the value of a tensor{where}, on which its path may depend. Write it with torch.where or a mask; or "
            "pass the value as a number in the arguments."
        )
    if isinstance(error, _RefusedError):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else 'no message'}"


_INSIDE = ("site-packages", "dist-packages", "pyro_kd/capture", "<string>")
