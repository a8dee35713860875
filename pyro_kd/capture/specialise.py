"""Makes a cache entry: observes the programs in ordinary runs without side effects, then traces and compiles one.

The first run sets up what programs set up lazily, such as autoguides. The second shows what they reach and what their guards answer.
If the two losses differ, a third run tells whether the programs depend on something that a graph would not see. Afterwards random
streams, also those of the programs' own generators, parameters and buffers are restored.

Knows the function that runs the programs, but no losses.
"""

import logging
import random
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_kd.capture.cache import CacheEntry, ExtraTensors
from pyro_kd.capture.guards import Answers, ObservedGuards
from pyro_kd.capture.key import Arguments
from pyro_kd.capture.own_generators import OwnGenerators
from pyro_kd.capture.refusal import RefusedError, reason_of
from pyro_kd.capture.run import Run, RunFunction
from pyro_kd.capture.stages import stage
from pyro_kd.capture.state import Place, ReachedState
from pyro_kd.capture.static_state import StaticState
from pyro_kd.capture.trace import trace
from pyro_kd.isolation.modes import uncompiled
from pyro_kd.utils.autocast import autocast_modes, without_autocast
from pyro_kd.utils.garbage import no_collections
from pyro_kd.utils.randomness import RandomState
from pyro_kd.utils.torch_internals import hooks_on_all_modules

__all__ = ["Specialiser"]

logger = logging.getLogger("pyro_kd.capture")

_OnTensors = Callable[..., Run]


class Specialiser:
    """Makes cache entries for one function of programs' arguments.

    Args:
        run, roots, frozen, ignored: as for :class:`~pyro_kd.capture.call.Capture`.
        extra: moves extra tensors.
        options: of ``torch.compile``.
    """

    def __init__(
        self,
        run: RunFunction,
        roots: Mapping[str, Any],
        *,
        frozen: Callable[[], Collection[Tensor]],
        ignored: Collection[str],
        extra: ExtraTensors,
        options: Mapping[str, Any],
    ) -> None:
        self._run = run
        self._roots = dict(roots) | {"torch's hooks on all modules": hooks_on_all_modules()}
        self._frozen = frozen
        self._ignored = ignored
        self._extra = extra
        self._options = options
        self._num_observed = 0

    def make(
        self, arguments: Arguments, extra: tuple[Tensor, ...], static: Hashable, *, may_hold_frozen: bool
    ) -> CacheEntry:
        """A cache entry for a call, with a graph, or with the reason why there is none.

        Args:
            arguments: arguments of the programs.
            extra: tensors of any shapes that the run takes besides them.
            static: everything else that it depends on.
            may_hold_frozen: whether frozen tensors may be constants of the graph; otherwise they are inputs.
        """
        given = [_as_leaf(tensor) for tensor in arguments.tensors]
        tensors = [*given, *extra]
        call = self._on_tensors(arguments, static)
        roots = self._roots | arguments.objects() | {"static": static}
        known = StaticState(roots, self._ignored)
        before, state = RandomState.now(), ReachedState(known.modules, [*known.tensors, *tensors])
        own, refusal = OwnGenerators(roots.values()), None
        try:
            # The first run gets copies of the tensors, so that a program that stores an argument is noticed.
            first, _ = self._observe(call, _other_objects(tensors), state, before, own)
            roots |= {f"module {n}": module for n, module in enumerate(state.modules) if module not in known.modules}
            one = StaticState(roots, self._ignored)
            state.add(one.modules, one.tensors)
            seen, answers = self._observe(call, tensors, state, before, own)
            two = StaticState(roots, self._ignored)
            tensors[len(given) :] = self._extra.on(seen.loss.device, extra)
            try:
                if not _is_close(first, seen):
                    again, _ = self._observe(call, tensors, state, before, own)
                    _require_repeatable(again, seen, one.differences(two))
                entry = self._traced(call, tensors, seen, state, answers, two, self._frozen() if may_hold_frozen else ())
            except Exception as error:  # any error that a program causes in a trace
                refusal = reason_of(error)
                logger.debug("capture failed", exc_info=error)
        finally:
            before.restore()
            state.restore()
            own.restore()
        # What the programs write themselves is not an input, as long as the loss is the same in each run.
        written = one.differences(two) | two.differences(StaticState(roots, self._ignored))
        reached = StaticState(roots, {*self._ignored, *written})
        if refusal is not None:
            return CacheEntry(reached, refusal=refusal)
        entry.static = reached
        return entry

    def validate(self, arguments: Arguments, extra: tuple[Tensor, ...], static: Hashable, written: Sequence[Tensor]) -> None:
        """Run the programs without a graph, for their checks: errors are raised, and there are no side effects.

        Args:
            arguments: arguments of the programs.
            extra: tensors of any shapes that the run takes besides them.
            static: everything else that it depends on.
            written: the tensors, of any shapes, that a run writes to.
        """
        tensors = arguments.tensors
        before, state = RandomState.now(), ReachedState((), written)
        try:
            with torch.no_grad():
                self._on_tensors(arguments, static)(*tensors, *extra)
        finally:
            before.restore()
            state.restore()

    def _on_tensors(self, arguments: Arguments, static: Hashable) -> _OnTensors:
        """The run as a function of the tensors among the arguments, and of the extra ones."""

        count = len(arguments.tensors)

        def call(*tensors: Tensor) -> Run:
            args, kwargs = arguments.filled(tensors[:count])
            with poutine.block(), uncompiled():
                return self._run(tensors[count:], args, kwargs, static)

        return call

    def _observe(
        self, call: _OnTensors, tensors: Sequence[Tensor], state: ReachedState, before: RandomState, own: OwnGenerators
    ) -> tuple[Run, Answers]:
        """Run without a graph, with all checks and without side effects. Returns the run, and the answers of its guards."""
        before.restore()
        self._num_observed += 1
        # Each run gets different random numbers of Python and NumPy, which a graph cannot draw.
        for _ in range(self._num_observed):
            random.random()
            np.random.random_sample()
        with state, own, ObservedGuards() as guards:
            seen = call(*tensors)
        before.restore()
        state.restore()
        return seen, guards.answers

    def _traced(
        self,
        call: _OnTensors,
        tensors: Sequence[Tensor],
        seen: Run,
        state: ReachedState,
        answers: Answers,
        static: StaticState,
        frozen: Collection[Tensor],
    ) -> CacheEntry:
        """A cache entry with the run as a compiled graph."""
        notes: list[Any] = []

        def run(*given: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
            again = call(*given)
            notes.append(again.notes)
            return again.loss, again.details

        if state.replaced:
            raise RefusedError(
                f"the program replaces buffer {min(state.replaced)!r} by a new tensor; write to it instead: self.buffer.add_(1)"
            )
        ids = {id(tensor) for tensor in tensors}
        places, ties = state.places()
        if any(id(place.tensor()) in ids for place in places):
            raise RefusedError("a parameter of the programs is also among their arguments")
        order = {id(tensor): number for number, tensor in enumerate([*(place.tensor() for place in places), *tensors])}
        leaves = sorted(seen.leaves, key=lambda leaf: order.get(id(leaf), len(order)))  # the same in every process
        places += [Place.of(leaf) for leaf in leaves if id(leaf) not in order]
        with pyro.validation_enabled(False):  # torch.compile turns it off for good
            with stage("tracing the programs"), no_collections():
                graph = trace(run, places, tensors, leaves, answers, frozen)
            entry = CacheEntry(static, graph, ties=ties, params=seen.params, notes=notes[-1], device=seen.loss.device)
            with stage(f"compiling {graph.num_operations:,} operations"), without_autocast(autocast_modes()):
                with no_collections():
                    graph.compile(tensors, self._options)
                graph(graph.inputs(tensors))  # compiles
        return entry


def _require_repeatable(again: Run, seen: Run, written: set[str]) -> None:
    """Raise RefusedError where two runs on the same parameters and noise have different losses.

    Args:
        again, seen: the two runs.
        written: paths of what changes between runs.
    """
    if _is_close(again, seen):
        return
    if again.form != seen.form:
        raise RefusedError(
            "a distribution of the program holds an object that each run makes anew, such as a function or a module. Make it once, "
            "outside of the program."
        )
    names = ", ".join(sorted(written)[:3])
    others = "random numbers of Python or NumPy or of a torch.Generator of their own, or on a clock"
    what = f"what they change themselves ({names})" if names else others
    raise RefusedError(
        "with the same parameters and the same noise of torch, the results differ from run to run: the programs depend on "
        f"{what}, which a graph does not see. Pass it in the arguments."
    )


def _as_leaf(tensor: Tensor) -> Tensor:
    """The tensor itself if it is a leaf, or else a leaf with its values, so that a loss can be differentiated with respect to it."""
    return tensor if tensor.is_leaf else tensor.detach().requires_grad_()


def _other_objects(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors as new objects. Tensors that were the same object are the same new object."""
    made = {id(tensor): tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors}
    return [made[id(tensor)] for tensor in tensors]


def _is_close(one: Run, two: Run) -> bool:
    """Whether two runs had the same results, up to rounding on a GPU, which adds up in no fixed order."""
    ones, twos = (one.loss, *one.details), (two.loss, *two.details)
    return one.form == two.form and len(ones) == len(twos) and all(map(_are_close, ones, twos))


def _are_close(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    one, two = one.detach(), two.detach()
    if one.device.type == "cpu":
        return torch.allclose(one, two, rtol=0.0, atol=0.0, equal_nan=True)
    size = two.double().abs().nan_to_num(posinf=0.0).amax().item() if two.numel() else 0.0
    return torch.allclose(one, two, rtol=1e-4, atol=1e-4 * size, equal_nan=True)
