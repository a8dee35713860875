"""The parameters that a run trains: found by running the programs, and by what each step reaches.

A first run shows most of them. A program may make or use others later, on a path that depends on a draw. So after each backward pass
the parameters in Pyro's store and in the programs' modules are looked at: one that has a gradient is trained from then on, as SVI
does it. Knows objectives and gradients; no optimisers.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import pyro
from torch import Tensor, nn

from pyro_kd.errors import ProcessGroupError, listing
from pyro_kd.isolation.reaching import Reached
from pyro_kd.training.batches import Call
from pyro_kd.training.gradients import nothing_to_train
from pyro_kd.training.objectives import Objective
from pyro_kd.training.parameters import ProgramState
from pyro_kd.utils.pyro_internals import unconstrained_params
from pyro_kd.utils.randomness import keeping_random_state

__all__ = ["TrainedParameters"]

_LIVE: "weakref.WeakSet[TrainedParameters]" = weakref.WeakSet()
"""Those of all trainers."""


class TrainedParameters:
    """Finds what is trained.

    Args:
        objectives: what is minimised, by name.
        on_change: called when the parameters have been found anew.

    Attributes:
        named: the parameters that are trained, by name; empty before the first step.
        state: all tensors that the programs train or keep.
    """

    def __init__(self, objectives: Mapping[str, Objective], on_change: Callable[[], None]) -> None:
        self.named: dict[str, Tensor] = {}
        self.state = ProgramState()
        self._objectives = objectives
        self._on_change = on_change
        self._reached: list[nn.Module] = []
        self._reached_with: list[int] | None = None
        self._others: list[Tensor] = []  # as long as the same tensors are there
        _LIVE.add(self)

    def find(self, call: Call) -> None:
        """Find the parameters by a run.

        Args:
            call: arguments of a step.

        Raises:
            NoParametersError: the programs have no parameter that requires a gradient.
            ProcessGroupError: a parameter is divided among processes.

        Warns:
            UserWarning: a different trainer trains the parameters too, for programs that have nothing else in common with these.
        """
        is_first = not self.named
        self.discover(call)
        if self.state.identities != self._reached_with:  # a walk through all that the programs hold may take long
            self._reached = list(Reached(*self._programs).modules)
            self._reached_with = self.state.identities
        self._take()
        if is_first:
            self._warn_of_others()

    def find_new(self, call: Call) -> None:
        """Find them before the first step, and when the programs or a callback have made or replaced one."""
        if not self.named or not self.state.is_current:
            self.find(call)

    def discover(self, call: Call) -> None:
        """Run every trained program once, on the arguments of its objective, and leave the random stream as it was."""
        with keeping_random_state():
            runs = [run for objective in self._objectives.values() for run in objective.trained_runs(call)]
        self.state.discover(runs)
        with keeping_random_state():
            for objective in self._objectives.values():
                objective.guess_plate_nesting(call)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Stands around the gradients of a step, so that :meth:`look` knows those of the step from earlier ones.

        What has a gradient and is not trained, such as a parameter of another model, has the same gradient afterwards.
        """
        before = {tensor: tensor.grad for tensor in self._others if tensor.grad is not None}
        for tensor in before:
            tensor.grad = None
        try:
            yield
        finally:
            for tensor in self._others:
                tensor.grad = before.get(tensor)

    def look(self, call: Call) -> None:
        """Train what a backward pass has given a gradient, too, and find what the programs have made or replaced.

        Args:
            call: arguments of the step.
        """
        is_current = self.state.is_current
        if not is_current:
            self._others = self._not_trained()
        self.adopt({tensor for tensor in self._others if tensor.grad is not None})
        if not is_current:
            self.find(call)

    def adopt(self, leaves: set[Tensor]) -> None:
        """Train the leaf tensors that a loss has reached, as far as they are in Pyro's store or in a module."""
        missed = leaves - {*self.named.values()}
        if missed:
            self.state.adopt(missed, self._reached)
            self._take()

    def clear_gradients(self) -> None:
        """Set all gradients to None."""
        for param in self.named.values():
            param.grad = None

    @property
    def _programs(self) -> list[Callable[..., object]]:
        return [program for objective in self._objectives.values() for program in objective.trained_programs]

    def _warn_of_others(self) -> None:
        """Warn of parameters that a different trainer trains for other programs, which have only a name in Pyro's store in common."""
        for other in list(_LIVE):
            theirs = {*other.named.values()}
            shared = [name for name, tensor in self.named.items() if other is not self and tensor in theirs]
            if shared and _are_apart(Reached(*self._programs), Reached(*other._programs)):
                warnings.warn(
                    f"a different trainer trains {listing(shared[:5])}, too: the students of both have pyro.param statements of "
                    "these names, and so share entries of Pyro's store. This student starts from what the other one has learnt, and "
                    "changes it. Give the parameters different names; or, when the other student is done and saved, call "
                    "pyro.clear_param_store() before this one is first run. If they are meant to be shared: "
                    "warnings.filterwarnings('ignore', 'a different trainer').",
                    stacklevel=2,
                )

    def _take(self) -> None:
        before, self.named = self.named, self.state.trainable
        for tensor in {*before.values()} - {*self.named.values()}:  # an optimiser would go on with its last gradient
            tensor.grad = None
        if not self.named:
            raise nothing_to_train(self._programs)
        _refuse_divided(self.named, self.state.modules)
        self._others = self._not_trained()
        self._on_change()

    def _not_trained(self) -> list[Tensor]:
        """The parameters in Pyro's store and in modules that the programs reach, but none that is trained so far."""
        trained = {*self.named.values()}
        stored = unconstrained_params(pyro.get_param_store()).values()
        held = [tensor for module in self._reached for tensor in module._parameters.values() if tensor is not None]
        return [tensor for tensor in (*stored, *held) if tensor.requires_grad and tensor not in trained]


def _are_apart(first: Reached, second: Reached) -> bool:
    """Whether programs have no function, module or tensor in common."""
    return first.functions.isdisjoint(second.functions) and first.all_tensors().keys().isdisjoint(second.all_tensors())


def _refuse_divided(params: Mapping[str, Tensor], modules: Iterable[nn.Module]) -> None:
    """Raise ProcessGroupError where a parameter is divided among processes."""
    divided = [
        type(module).__name__ for module in modules if any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
    ]
    divided += [name for name, param in params.items() if getattr(param, "device_mesh", None) is not None]
    if divided:
        raise ProcessGroupError(
            f"{divided[0]!r} of the student is divided among processes, as fully_shard of FSDP2 does it. A trainer adds up whole "
            "gradients and writes whole parameters: leave out fully_shard, so that every process holds the student; or write the "
            "loop yourself, as docs/several_processes.md shows."
        )
