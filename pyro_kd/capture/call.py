"""The life of a captured call: from its arguments to a key, to a cache entry, through its graph, to the loss.

All other files of this folder serve this one; docs/capture.md has a diagram. Knows no losses: :mod:`pyro_kd.losses.captured` and
:mod:`pyro_kd.training.compiled` define what is run.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import pyro
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.util import is_validation_enabled
from torch import Tensor

from pyro_kd.capture.cache import Cache, CacheEntry, Specialisation
from pyro_kd.capture.compile import check_options
from pyro_kd.capture.deferred import DeferredReads
from pyro_kd.capture.key import Arguments, call_key
from pyro_kd.capture.run import Outputs, RunFunction
from pyro_kd.capture.specialise import Specialiser
from pyro_kd.utils.autocast import autocast_modes, without_autocast
from pyro_kd.utils.pyro_internals import HANDLER_STACK, collects_params, unconstrained_params
from pyro_kd.utils.torch_internals import are_transforms_active

__all__ = ["MAX_GRAPHS", "Capture"]

MAX_GRAPHS = 8
"""How many graphs one capture keeps; calls with further signatures run without a graph."""

MAX_MISSES = 3
"""A graph ends after this number of calls in which one of its guards did not hold."""

_MOST_UNVALIDATED = 400
"""At least once in this number of calls of a graph, the programs run with every check of Pyro and torch."""

_NOTHING = contextlib.nullcontext()

logger = logging.getLogger("pyro_kd.capture")


class Capture:
    """Runs a function of programs' arguments as a graph of tensors.

    Args:
        run: the function to trace, ``f(tensors, args, kwargs, static)``. It runs the programs and returns a
            :class:`~pyro_kd.capture.run.Run`.
        eager: the function that is called where there is no graph, with the same arguments. It performs all checks itself.
        roots: the objects that the run depends on, by names for messages: programs, and objects with options. What they reach is
            found by itself.
        what: a name of the function, for messages.
        frozen: returns the tensors that keep their values as long as nobody writes to them, such as a frozen teacher's.
        ignored: paths from the roots that the run does not depend on, or that are passed in ``static``, see
            :class:`~pyro_kd.capture.static_state.StaticState`.
        max_graphs: see :data:`MAX_GRAPHS`.
        options: options of ``torch.compile``, or ``background=True``.

    A graph is made for shapes, dtypes, devices and flags of tensors, for the values of all other arguments, for everything static
    that the roots reach, such as modes of modules, and for grad mode and autocast. The first such call runs the programs three times,
    with no effect on parameters, buffers and random streams: to let them set themselves up, to see what they reach, and to trace.
    What cannot be captured runs without a graph, and a warning gives the reason.
    """

    def __init__(
        self,
        run: RunFunction,
        eager: RunFunction,
        roots: Mapping[str, Any],
        what: str,
        frozen: Callable[[], Collection[Tensor]] = tuple,
        ignored: Collection[str] = (),
        max_graphs: int = MAX_GRAPHS,
        **options: Any,
    ) -> None:
        check_options(options)
        self._eager = eager
        self._what = what
        self._cache = Cache(max_graphs, self._warn)
        self._specialiser = Specialiser(run, roots, frozen=frozen, ignored=ignored, extra=self._cache.extra, options=options)
        self._deferred = DeferredReads()
        self._warned: set[str] = set()
        self._is_full = False

    @property
    def num_graphs(self) -> int:
        """The number of graphs."""
        return self._cache.num_graphs

    def __call__(
        self, tensors: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any], static: Hashable = None
    ) -> Outputs:
        """Run the graph for these arguments, which is made if necessary; or run the programs, if there is no graph or a guard fails.

        On a GPU no call waits for its guards. Whether they hold is known a few calls later; if they did not, the gradient of that
        call is 0.

        Args:
            tensors: tensors of any shapes that the run takes besides the programs' arguments. They are moved to the device of the
                loss, once for the same tensors.
            args, kwargs: arguments of the programs.
            static: everything else that the run depends on; different values have different graphs.
        """
        outputs = self._from_graph(tensors, args, kwargs, static)
        return Outputs.of(self._eager(tensors, args, kwargs, static)) if outputs is None else outputs

    def _from_graph(
        self, extra: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any], static: Hashable
    ) -> Outputs | None:
        """The outputs of the graph for this call; None if there is none, or its guards do not hold."""
        self._deferred.collect()
        if are_transforms_active():
            raise RuntimeError(
                "torch.func (grad, vmap, jvp) cannot transform a captured loss, whose graph has the gradient: use loss.backward() or "
                "torch.autograd.grad"
            )
        if HANDLER_STACK and not all(map(_is_harmless, HANDLER_STACK)):
            return None
        arguments, autocast = Arguments.of(args, kwargs), autocast_modes()
        tensors = arguments.tensors
        try:
            specialisation = self._cache.get(call_key(arguments, tensors, autocast, static))
        except TypeError:
            self._warn("an argument of the programs, or an option of the loss, is neither a tensor nor hashable")
            return None
        if specialisation is None:
            self._warn_full()
            return None
        entry, inputs = specialisation.find(tensors, extra)
        if entry is None and not specialisation.is_full:
            self._specialise(specialisation, arguments, extra, static)
            entry, inputs = specialisation.find(tensors, extra)
        if entry is None or entry.graph is None:
            return None
        is_watched = bool(HANDLER_STACK) and any(map(collects_params, HANDLER_STACK))
        if is_watched and not unconstrained_params(pyro.get_param_store()).keys() >= set(entry.params):
            return None  # the store was cleared: a run without a graph registers the parameters again
        entry.num_calls += 1
        if entry.num_calls >= entry.next_validation and is_validation_enabled():
            entry.next_validation = entry.num_calls + min(entry.num_calls, _MOST_UNVALIDATED)
            on_device = self._cache.extra.on(entry.device, extra)
            self._specialiser.validate(arguments, on_device, static, entry.graph.written(inputs))
        undo = entry.graph.undo(inputs)
        with without_autocast(autocast) if autocast else _NOTHING:
            outputs = entry.graph(inputs, entry.notes)
        if not self._holds(entry, outputs):
            undo()
            return None
        if is_watched:
            for name in entry.params:  # SVI trains what it sees
                pyro.param(name)
        return outputs

    def _holds(self, entry: CacheEntry, outputs: Outputs) -> bool:
        """Whether the guards of a graph hold in this call. On a GPU this is a deferred read, and True is returned for now."""
        if outputs.holds is None:
            return True
        if outputs.holds.device.type != "cpu":
            self._deferred.add(outputs.holds, lambda holds: self._count_miss(entry, not holds))
            return True
        holds = bool(outputs.holds)
        self._count_miss(entry, not holds)
        return holds

    def _count_miss(self, entry: CacheEntry, is_miss: bool) -> None:
        entry.num_misses += is_miss
        if entry.num_misses >= MAX_MISSES and entry.graph is not None:
            entry.graph = None
            self._warn("Pyro or torch branch on the values of tensors, and take different branches in different calls")

    def _specialise(
        self, specialisation: Specialisation, arguments: Arguments, extra: tuple[Tensor, ...], static: Hashable
    ) -> None:
        """Make a cache entry, unless there are too many."""
        if self._cache.is_full:
            specialisation.is_full = True
            self._warn_full()
            return
        entry = self._specialiser.make(arguments, extra, static, may_hold_frozen=not specialisation.num_stale)
        specialisation.entries.append(entry)
        if entry.refusal is not None:
            self._warn(entry.refusal)
            return
        assert entry.graph is not None
        logger.info("%s: graph %d, of %d operations", self._what, self.num_graphs, entry.graph.num_operations)

    def _warn_full(self) -> None:
        if not self._is_full:
            refused = f", and {self._cache.num_refused} attempts failed" if self._cache.num_refused else ""
            self._warn(
                f"there are {self.num_graphs} graphs already{refused}, for different arguments, attributes, modes of modules or "
                "flags of parameters. Pass what changes from call to call as a tensor, and batches of one shape "
                "(DataLoader(drop_last=True)); or allow more: compile(max_graphs=...)"
            )
        self._is_full = True

    def _warn(self, reason: str) -> None:
        if reason in self._warned:
            return
        self._warned.add(reason)
        warnings.warn(f"{self._what} continues without a graph: {reason}", stacklevel=5)


def _is_harmless(handler: Any) -> bool:
    return collects_params(handler) or isinstance(handler, BlockMessenger)
