"""A run of probabilistic programs that its handlers see once for each kind of arguments; after that only tensors move."""

import contextlib
import logging
import random
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import is_validation_enabled
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_kd.capture.decisions import Decisions
from pyro_kd.capture.graph import Graph, Outputs, trace
from pyro_kd.capture.late import Late
from pyro_kd.capture.reach import Place, Reach
from pyro_kd.capture.sizes import DataDependentError
from pyro_kd.capture.statics import Statics
from pyro_kd.isolation.modes import uncompiled
from pyro_kd.utils.locations import line_of_error
from pyro_kd.utils.randomness import RandomState

__all__ = ["MAX_GRAPHS", "Capture", "Run"]

MAX_GRAPHS = 8
"""How many graphs one capture keeps; further kinds of arguments run without one."""

_MAX_MISSES = 3
"""After so many calls for which a decision of the captured run did not hold, there are no more."""

_MAX_STALE = 3
"""After so many changes of tensors whose values are baked in, there are no more."""

_MAX_LOST = 20
"""After so many calls in a row without a graph, calls are no longer compared with the graphs thing by thing."""

_VALIDATE_EVERY = 50
"""Calls of a graph, after which the programs run once more with every check of Pyro and torch."""

_HOOKS = [
    held for name, held in vars(torch.nn.modules.module).items() if name.startswith("_global_") and isinstance(held, dict)
]

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
    """A graph, and what it was captured under besides its inputs; without a graph, what a run was refused under."""

    statics: Statics
    graph: Graph | None = None
    ties: list[tuple[Place, Place]] = field(default_factory=list)
    params: set[str] = field(default_factory=set)
    notes: Any = None
    device: torch.device | None = None
    misses: int = 0
    calls: int = 0
    are_tied: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.are_tied = self._are_tied()

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether tied tensors are, and the inputs are of the kind."""
        return self._are_tied() == self.are_tied and self.graph is not None and self.graph.fits(inputs)

    def _are_tied(self) -> list[bool]:
        return [one.tensor() is two.tensor() for one, two in self.ties]


@dataclass(slots=True)
class _Kind:
    """The graphs for one kind of arguments.

    Attributes:
        entries: them.
        is_full: whether there will be no more.
        num_stale: how many have ended with a tensor whose value they were made with: a frozen teacher's, at first.
        num_lost: calls in a row that none was made for.
    """

    entries: list[_Entry] = field(default_factory=list)
    is_full: bool = False
    num_stale: int = 0
    num_lost: int = 0


class _RefusedError(RuntimeError):
    """A run that must not be captured."""


class Capture:
    """Runs a function of programs' arguments as a graph of tensors.

    Args:
        run: ``f(extra, args, kwargs)`` runs the programs and returns a :class:`Run`.
        roots: what the run depends on, by names for messages: programs, and whatever has options. What they reach is found.
        what: for messages.
        frozen: returns the tensors that keep their values as long as nobody writes to them: a frozen teacher's.
        ignored: paths from the roots that the run does not depend on, or sees in ``key``, see :class:`Statics`.
        max_graphs: see :data:`MAX_GRAPHS`.
        options: of ``torch.compile``.

    The first call for a kind of arguments (shapes, dtypes, devices and flags of tensors, values of everything else; everything
    static that the roots reach, such as modes of modules; grad mode and autocast) runs the programs three times without an effect on
    parameters, buffers and random streams: to set up what they set up, to see what they reach, and to trace. What cannot be captured
    stays without a graph, with a warning that says why.
    """

    def __init__(
        self,
        run: Callable[[tuple[Tensor, ...], tuple[Any, ...], dict[str, Any]], Run],
        roots: Mapping[str, Any],
        what: str,
        frozen: Callable[[], Collection[Tensor]] = tuple,
        ignored: Collection[str] = (),
        max_graphs: int = MAX_GRAPHS,
        **options: Any,
    ) -> None:
        self._run = run
        self._roots = dict(roots) | {"torch's hooks on all modules": _HOOKS}
        self._ignored = ignored
        self._what = what
        self._frozen = frozen
        self._options = options
        self._max_graphs = max_graphs
        self._kinds: dict[Any, _Kind] = {}
        self._late = Late()
        self._moved: tuple[torch.device, tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
        self.num_graphs = 0
        self._num_refused = 0
        self._num_looks = 0
        self._warned: set[str] = set()
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
            if not self._may_capture():
                self._warn_full()
                return None
            kind = self._kinds[kind_key] = _Kind()
        entry, inputs = self._find(kind, tensors, extra)
        if entry is None and not kind.is_full:
            self._capture(kind, extra, leaves, spec)
            entry, inputs = self._find(kind, tensors, extra)
        if entry is None or entry.graph is None:
            return None
        is_watched = bool(_PYRO_STACK) and any(map(_watches, _PYRO_STACK))
        if is_watched and not entry.params <= pyro.get_param_store()._params.keys():
            return None  # the store was cleared: an ordinary run registers them again
        entry.calls += 1
        if entry.calls % _VALIDATE_EVERY == 0 and is_validation_enabled():
            self._validate(entry.graph.written(inputs), self._on(entry.device, extra), leaves, spec)
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
        if entry.misses >= _MAX_MISSES and entry.graph is not None:
            entry.graph = None
            self._warn("Pyro or torch decide by the values of tensors, otherwise in one call than in another")

    def _on(self, device: torch.device | None, extra: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Extra tensors on a device."""
        if device is None or all(tensor.device == device for tensor in extra):
            return extra
        if self._moved is None or self._moved[0] != device or tuple(map(id, self._moved[1])) != tuple(map(id, extra)):
            self._moved = device, extra, tuple(tensor.to(device, non_blocking=True) for tensor in extra)
        return self._moved[2]

    def _find(self, kind: _Kind, tensors: list[Tensor], extra: tuple[Tensor, ...]) -> tuple[_Entry | None, list[Tensor]]:
        """The entry of a kind for what there is now, with its inputs."""
        for entry in kind.entries:
            if entry.statics.is_untouched() and (inputs := self._inputs(kind, entry, tensors, extra)) is not None:
                kind.num_lost = 0
                return entry, inputs
        if kind.num_lost > _MAX_LOST:
            return None, []
        notes = dict[frozenset[str], Statics]()
        for entry in kind.entries:
            if entry.statics.is_equal(notes) and (inputs := self._inputs(kind, entry, tensors, extra)) is not None:
                kind.num_lost = 0
                return entry, inputs
        kind.num_lost += kind.is_full
        return None, []

    def _inputs(self, kind: _Kind, entry: _Entry, tensors: list[Tensor], extra: tuple[Tensor, ...]) -> list[Tensor] | None:
        """The inputs of an entry's graph as they are now; none where it was refused. None where the graph is not for them."""
        if entry.graph is None:
            return []
        try:
            inputs = entry.graph.inputs([*tensors, *self._on(entry.device, extra)])
            if not entry.fits(inputs):
                return None
            if entry.graph.is_current():
                return inputs
        except (KeyError, AttributeError):  # a parameter that was there is gone
            return None
        entry.graph = None
        kind.entries = [other for other in kind.entries if other is not entry]
        kind.num_stale += 1
        self.num_graphs -= 1
        if kind.num_stale > _MAX_STALE:
            kind.is_full = True
            self._warn("a tensor that shapes or numbers in the programs are made of changes from call to call")
        return None

    def _may_capture(self) -> bool:
        return self.num_graphs + self._num_refused < self._max_graphs

    def _capture(self, kind: _Kind, extra: tuple[Tensor, ...], leaves: list[Any], spec: Any) -> None:
        if not self._may_capture():
            kind.is_full = True
            self._warn_full()
            return
        numbers = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [*(_as_leaf(leaves[number]) for number in numbers), *extra]
        call = self._caller(leaves, spec, numbers)
        roots = self._roots | {f"argument {n}": leaf for n, leaf in enumerate(leaves) if not isinstance(leaf, _PLAIN)}
        known = Statics(roots, self._ignored)
        before, reach = RandomState.now(), Reach(known.modules, [*known.tensors, *tensors])
        try:
            # The first sets up autoguides, and checks what is checked once. Programs that keep an argument keep another object in it.
            first, _ = self._look(call, _other_objects(tensors), reach, before)
            roots |= {f"module {n}": module for n, module in enumerate(reach.modules) if module not in known.modules}
            one = Statics(roots, self._ignored)
            reach.add(one.modules, one.tensors)
            seen, answers = self._look(call, tensors, reach, before)
            two = Statics(roots, self._ignored)
            tensors[len(numbers) :] = self._on(seen.loss.device, extra)
            entry = None
            try:
                if not _is_close(first.loss, seen.loss):
                    self._require_repeatable(call, tensors, reach, before, seen, one.differences(two))
                frozen = () if kind.num_stale else self._frozen()
                entry = self._trace(call, tensors, seen, reach, answers, two, frozen)
            except Exception as error:  # whatever tracing meets in a program
                self._warn(_reason(error))
                logger.debug("%s: capture failed", self._what, exc_info=error)
        finally:
            before.restore()
            reach.restore()
        # What the programs write themselves is no input of theirs, as long as the loss is the same in each run.
        written = one.differences(two) | two.differences(Statics(roots, self._ignored))
        statics = Statics(roots, {*self._ignored, *written})
        if entry is None:
            self._num_refused += 1
            kind.entries.append(_Entry(statics))
            return
        entry.statics = statics
        kind.entries.append(entry)
        self.num_graphs += 1
        assert entry.graph is not None
        logger.info("%s: graph %d, of %d operations", self._what, self.num_graphs, entry.graph.num_operations)

    def _caller(self, leaves: list[Any], spec: Any, numbers: Sequence[int]) -> Callable[..., Run]:
        """The run as a function of the tensors among the arguments, by their numbers, and of the extra ones."""

        def call(*given: Tensor) -> Run:
            filled = list(leaves)
            for number, tensor in zip(numbers, given, strict=False):
                filled[number] = tensor
            args, kwargs = (tuple(filled), {}) if spec is None else pytree.tree_unflatten(filled, spec)
            with poutine.block(), uncompiled():
                return self._run(tuple(given[len(numbers) :]), args, kwargs)

        return call

    def _look(
        self, call: Callable[..., Run], tensors: list[Tensor], reach: Reach, before: RandomState
    ) -> tuple[Run, Mapping[Any, Sequence[Any]]]:
        """An ordinary run, with all its checks and without an effect: what it reaches, and the decisions on its way."""
        before.restore()
        self._num_looks += 1
        for _ in range(self._num_looks):  # each on other random numbers of Python and NumPy, which no graph can draw
            random.random()
            np.random.random_sample()
        with reach, Decisions() as decisions:
            seen = call(*tensors)
        before.restore()
        reach.restore()
        return seen, decisions.answers

    def _require_repeatable(
        self,
        call: Callable[..., Run],
        tensors: list[Tensor],
        reach: Reach,
        before: RandomState,
        seen: Run,
        written: set[str],
    ) -> None:
        """Raise _RefusedError where the loss is another one in a third run on the same parameters and noise."""
        again, _ = self._look(call, tensors, reach, before)
        if not _is_close(again.loss, seen.loss):
            names = ", ".join(sorted(written)[:3])
            what = f"what they change themselves ({names})" if names else "random numbers of Python or NumPy, or on a clock"
            raise _RefusedError(
                "on the same parameters and the same noise of torch the loss is another one in each run: the programs depend on "
                f"{what}, which a graph does not see. Pass it in the arguments."
            )

    def _validate(self, written: list[Tensor], extra: tuple[Tensor, ...], leaves: list[Any], spec: Any) -> None:
        """An ordinary run, for its checks: it raises what they raise, and has no other effect.

        Args:
            written: the tensors that a run writes to.
            extra, leaves, spec: the arguments.
        """
        numbers = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        before, reach = RandomState.now(), Reach((), written)
        try:
            with torch.no_grad():
                self._caller(leaves, spec, numbers)(*(leaves[number] for number in numbers), *extra)
        finally:
            before.restore()
            reach.restore()

    def _trace(
        self,
        call: Callable[..., Run],
        tensors: list[Tensor],
        seen: Run,
        reach: Reach,
        answers: Mapping[Any, Sequence[Any]],
        statics: Statics,
        frozen: Collection[Tensor],
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
        with pyro.validation_enabled(False):  # torch.compile turns it off for good
            graph = trace(run, places, tensors, leaves, answers, frozen)
            entry = _Entry(statics, graph, ties, set(seen.params), seen.notes, seen.loss.device)
            graph.compile(tensors, self._options)
            with _no_autocast(_autocast()):
                graph(graph.inputs(tensors))  # compiles
        return entry

    def _warn_full(self) -> None:
        if not self._is_full:
            refused = f", and {self._num_refused} attempts failed" if self._num_refused else ""
            self._warn(
                f"there are {self.num_graphs} graphs already{refused}, for other arguments, or other attributes, modes of modules "
                "or flags of parameters. Pass what changes from call to call as a tensor, and batches of one shape "
                "(DataLoader(drop_last=True)); or allow more: compile(max_graphs=...)"
            )
        self._is_full = True

    def _warn(self, reason: str) -> None:
        if reason in self._warned:
            return
        self._warned.add(reason)
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
    return tuple([None if isinstance(leaf, Tensor) else (type(leaf), leaf, _parts(leaf)) for leaf in leaves])


def _parts(leaf: Any) -> str:
    """What an argument holds whose class has an equality of its own, which need not look at everything."""
    if type(leaf).__module__ == "builtins" or type(leaf).__eq__ is object.__eq__:
        return ""
    return repr(Statics({"": leaf}).tokens)


def _same(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Which arguments are one tensor: a graph of f(x, x) is not one of f(x, y)."""
    ids = [id(tensor) for tensor in tensors]
    return tuple([ids.index(number) for number in ids])


def _as_leaf(tensor: Tensor) -> Tensor:
    """A tensor by which a loss can be differentiated, whatever it was computed from."""
    return tensor if tensor.is_leaf else tensor.detach().requires_grad_()


def _other_objects(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors as other objects, equal ones as one object."""
    made = {id(tensor): tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors}
    return [made[id(tensor)] for tensor in tensors]


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
        return (
            f"the program reads the value of a tensor{line_of_error(error)}, on which its path may depend. Write it with "
            "torch.where or a mask; or pass the value as a number in the arguments."
        )
    if isinstance(error, _RefusedError | DataDependentError):
        return str(error)
    message = str(error).strip().splitlines()[0] if str(error) else "no message"
    return f"{type(error).__name__}{line_of_error(error)}: {message}"


def _is_close(one: Tensor, two: Tensor) -> bool:
    """Whether two runs gave one loss; those of a GPU add up in no fixed order."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    rtol = 0.0 if one.device.type == "cpu" else 1e-4
    return torch.allclose(one.detach(), two.detach(), rtol=rtol, atol=0.0, equal_nan=True)
