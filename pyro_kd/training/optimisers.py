"""One interface for torch's and Pyro's optimisers."""

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_kd.errors import CheckpointError, NoParametersError, OptimiserMismatchError
from pyro_kd.utils.pyro_internals import (
    dotted_name,
    forget_waiting_moments,
    options_for,
    unconstrained_params,
    waiting_states,
)
from pyro_kd.utils.user_code import called

__all__ = ["Adapter", "Optimiser", "Scheduler", "make_optimiser"]

Optimiser = Optimizer | PyroOptim | Callable[[list[Tensor]], Optimizer]
Scheduler = LRScheduler | ReduceLROnPlateau | Callable[[Optimizer], Any]


class Adapter(Protocol):
    """What the loop needs of an optimiser."""

    def bind(self, params: Mapping[str, Tensor]) -> None:
        """Take the parameters to train; called again when there are new ones."""

    def step(self) -> float | None:
        """Update the parameters by their gradients, and advance the schedule of the learning rate.

        Returns:
            The learning rate of this step, or None if there are several.
        """

    def restart(self) -> None:
        """Forget the moments of past gradients, as if the optimiser were new. Learning rate and schedule stay."""

    def on_validation(self, value: float) -> None:
        """Pass a validation loss to a scheduler that depends on it."""

    @property
    def name(self) -> str:
        """Name of the optimiser and its scheduler, for checkpoints."""

    @property
    def defaults(self) -> dict[str, Any]:
        """The options that the optimiser was made with."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` has returned."""


class _Loaded:
    """Whether an optimiser has taken a step since its state was loaded: before that, an error is one of the state.

    Attributes:
        is_tried: whether it has, or nothing was loaded.
    """

    def __init__(self) -> None:
        self.is_tried = True

    @contextmanager
    def on_trial(self) -> Iterator[None]:
        """Stands around a step.

        Raises:
            CheckpointError: the first step after a state was loaded has failed.
        """
        try:
            yield
        except Exception as error:  # of any type: the state is the optimiser's own affair
            if self.is_tried:
                raise
            raise CheckpointError(
                f"the optimiser's state that was loaded does not fit it: its first step has failed ({type(error).__name__}: "
                f"{error}). Resume from the checkpoint before it, in a new process."
            ) from error
        self.is_tried = True


_FUSED = (torch.optim.Adam, torch.optim.AdamW)
"""Optimisers that torch has as one kernel on a CPU."""


def _fuse(optim: Optimizer) -> None:
    """Let an optimiser take its fused step on a CPU where its options leave that open: a third of the time or less."""
    for group in optim.param_groups if type(optim) in _FUSED else []:
        params: list[Tensor] = group["params"]
        is_open = group["foreach"] is None and group["fused"] is None and not group["differentiable"]
        if is_open and all(param.device.type == "cpu" and param.is_floating_point() for param in params):
            group["fused"] = True


def _check_fused(optim: Optimizer) -> None:
    """Raise CheckpointError where the state of a fused step has a wrong shape: its kernel would read memory that is not its own."""
    for group in optim.param_groups:
        for param in group["params"] if group.get("fused") else []:
            for name, value in optim.state.get(param, {}).items():
                expected = torch.Size() if name == "step" else param.shape
                if isinstance(value, Tensor) and value.shape != expected:
                    raise CheckpointError(
                        f"the optimiser's state that was loaded belongs to different parameters: {name!r} of a parameter of shape "
                        f"{tuple(param.shape)} has shape {tuple(value.shape)}, where {tuple(expected)} is right."
                    )


class _TorchAdapter:
    def __init__(self, optim: Any, scheduler: Any) -> None:
        self._optim = optim
        self._scheduler = scheduler
        self._names: dict[Tensor, str] = {}
        self._loaded, self._loaded_scheduler = _Loaded(), _Loaded()
        self._initial: dict[Tensor, Any] = {}  # what some optimisers, such as Adagrad, make before their first step

    def bind(self, params: Mapping[str, Tensor]) -> None:
        own = set(params.values())
        if not isinstance(self._optim, Optimizer):
            self._optim = called(self._optim, "optim", "f(parameters)", list(params.values()))
            if not isinstance(self._optim, Optimizer):
                raise TypeError(
                    f"optim must be a torch or Pyro optimiser, or a function that makes one from a list of parameters, and not a "
                    f"function that returns {type(self._optim).__name__}"
                )
        elif not self._names:
            held = [tensor for group in self._optim.param_groups for tensor in group["params"]]
            foreign = [tuple(tensor.shape) for tensor in held if tensor not in own]
            if foreign:
                raise OptimiserMismatchError(
                    f"{len(foreign)} of the optimiser's {len(held)} parameters are not the student's (shapes "
                    f"{', '.join(map(str, foreign[:3]))}{', ...' if len(foreign) > 3 else ''}). Make it from the student's "
                    "parameters, or pass a function: optim=lambda params: torch.optim.Adam(params, lr=1e-3)."
                )
        else:
            self._add({name: tensor for name, tensor in params.items() if tensor not in self._names})
        unused = {tensor: state for tensor, state in self._optim.state.items() if state.get("step", 1) == 0}
        self._initial |= {tensor: copy.deepcopy(unused[tensor]) for tensor in own - {*self._names} if tensor in unused}
        self._names |= {tensor: name for name, tensor in params.items()}
        if isinstance(self._optim, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS evaluates the loss several times per step, which this loop does not: use a first-order optimiser"
            )
        _fuse(self._optim)
        if self._scheduler is not None and not isinstance(self._scheduler, LRScheduler | ReduceLROnPlateau):
            self._scheduler = called(self._scheduler, "scheduler", "f(optimiser)", self._optim)

    def _add(self, new: Mapping[str, Tensor]) -> None:
        """Train parameters that the programs have made since: in the only group, or in one with the optimiser's defaults.

        Raises:
            OptimiserMismatchError: there are several groups and a scheduler, which knows no rate for one more.
        """
        if not new:
            return
        groups = self._optim.param_groups
        if len(groups) == 1:
            groups[0]["params"] += new.values()
        elif self._scheduler is None:
            self._optim.add_param_group({"params": [*new.values()]})
        else:
            raise OptimiserMismatchError(
                f"the student has made {', '.join(map(repr, new))} during training. The optimiser has {len(groups)} groups of "
                "parameters, and its scheduler has no learning rate for one more. Run the student once before you make the "
                "optimiser, and put each parameter into a group."
            )
        if self._initial:  # it makes its state before the first step
            options = {name: groups[-1][name] for name in self._optim.defaults if name in groups[-1]}
            self._optim.state.update(type(self._optim)([*new.values()], **options).state)

    def step(self) -> float | None:
        with self._loaded.on_trial():
            rates = {float(group["lr"]) for group in self._optim.param_groups if "lr" in group}
            self._optim.step()
            if self._scheduler is not None and not isinstance(self._scheduler, ReduceLROnPlateau):
                self._scheduler.step()
            return rates.pop() if len(rates) == 1 else None

    def restart(self) -> None:
        self._optim.state.clear()
        self._optim.state.update({tensor: copy.deepcopy(state) for tensor, state in self._initial.items()})

    def on_validation(self, value: float) -> None:
        if isinstance(self._scheduler, ReduceLROnPlateau):
            with self._loaded_scheduler.on_trial():
                self._scheduler.step(value)

    @property
    def name(self) -> str:
        scheduler = "" if self._scheduler is None else f" with {type(self._scheduler).__name__}"
        return f"torch's {type(self._optim).__name__}{scheduler}"

    @property
    def defaults(self) -> dict[str, Any]:
        return dict(self._optim.defaults) if isinstance(self._optim, Optimizer) else {}

    def state_dict(self) -> dict[str, Any]:
        scheduler = None if self._scheduler is None else self._scheduler.state_dict()
        return {"optimiser": self._optim.state_dict(), "scheduler": scheduler, "names": self._names_in_order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded.is_tried = self._loaded_scheduler.is_tried = False
        self._optim.load_state_dict(_in_order(state["optimiser"], state.get("names"), self._names_in_order()))
        _check_fused(self._optim)
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])

    def _names_in_order(self) -> list[str]:
        """The names of the parameters, as the optimiser numbers them."""
        return [self._names.get(tensor, "") for group in self._optim.param_groups for tensor in group["params"]]


def _in_order(state: dict[str, Any], saved: Any, names: list[str]) -> dict[str, Any]:
    """An optimiser's state in the order of its parameters: one that was made during training is the last in the run that made it.

    Args:
        state: of one group at least.
        saved: the names in its order; None if it was written without them.
        names: the names in the order of the optimiser that loads it.
    """
    if len(state["param_groups"]) != 1 or not isinstance(saved, list) or saved == names or sorted(saved) != sorted(names):
        return state
    number = {name: index for index, name in enumerate(names)}
    return {**state, "state": {number[saved[index]]: value for index, value in state["state"].items()}}


class _PyroAdapter:
    def __init__(self, optim: PyroOptim) -> None:
        self._optim = optim
        self._params: list[Tensor] = []
        self._loaded = _Loaded()

    def bind(self, params: Mapping[str, Tensor]) -> None:
        for name, tensor in params.items():
            if pyro.get_param_store().param_name(tensor) is None:
                raise NoParametersError(
                    f"Pyro's optimisers train parameters of Pyro's store, and {name!r} is not in it. Register its module in the "
                    "student (pyro.module('net', net)), or use torch's: optim=lambda params: torch.optim.Adam(params, lr=1e-3)."
                )
        if callable(self._optim.pt_optim_args):
            self._warn_of_names({*params.values()} - {*self._params})
        self._params = list(params.values())

    def _warn_of_names(self, new: Collection[Tensor]) -> None:
        """Warn where one of these parameters has several names with different options: Pyro asks for those of the last name alone."""
        options_of: Any = self._optim.pt_optim_args
        names, warned = dict[Tensor, list[str]](), ""
        for name, tensor in unconstrained_params(pyro.get_param_store()).items():
            names.setdefault(tensor, []).append(dotted_name(name))
        for tensor in new:
            options, taken = options_for(self._optim, tensor), dotted_name(str(pyro.get_param_store().param_name(tensor)))
            for name in names[tensor]:
                # Errors of any type: the function is the user's, and is not asked for this name otherwise.
                with suppress(Exception):
                    other = options_of(name)
                    if repr(other) != repr(options):
                        warned = (
                            f"parameter {name!r} is {taken!r} too, and Pyro's optimiser takes the options of that name, {options}, "
                            f"and not {other}. Give both names the same options."
                        )
        if warned:
            warnings.warn(warned, stacklevel=2)

    def step(self) -> float | None:
        with self._loaded.on_trial():
            return self._step()

    def _step(self) -> float | None:
        self._optim(self._params)
        optims = [getattr(optim, "optimizer", optim) for optim in self._optim.optim_objs.values()]
        rates = {group["lr"] for optim in optims for group in optim.param_groups if "lr" in group}
        if isinstance(self._optim, PyroLRScheduler) and not self._listens():
            self._optim.step()
        return float(rates.pop()) if len(rates) == 1 else None

    def restart(self) -> None:
        forget_waiting_moments(self._optim)
        for param, optim in self._optim.optim_objs.items():
            make: Any = self._optim.pt_optim_constructor
            state = getattr(optim, "optimizer", optim).state
            state.clear()
            state.update(make([param], **options_for(self._optim, param)).state)

    def on_validation(self, value: float) -> None:
        if self._listens():
            self._optim.step(value)  # type: ignore[attr-defined]

    @property
    def name(self) -> str:
        constructor = getattr(self._optim, "pt_scheduler_constructor", None)
        scheduler = "" if constructor is None else f" with {constructor.__name__}"
        return f"Pyro's {getattr(self._optim.pt_optim_constructor, '__name__', 'optimiser')}{scheduler}"

    @property
    def defaults(self) -> dict[str, Any]:
        return {"options": self._optim.pt_optim_args, "clipping": self._optim.pt_clip_args}

    def state_dict(self) -> dict[str, Any]:
        return waiting_states(self._optim) | self._optim.get_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded.is_tried = False
        self._optim.set_state(state)

    def _listens(self) -> bool:
        return getattr(self._optim, "pt_scheduler_constructor", None) is ReduceLROnPlateau


def make_optimiser(optim: Any, scheduler: Any) -> Adapter:
    """The adapter for an optimiser and, with an optimiser of torch, a scheduler of its learning rate."""
    if isinstance(optim, PyroOptim):
        if scheduler is not None:
            raise TypeError("a Pyro optimiser contains its scheduler: pyro.optim.ExponentialLR({'optimizer': ..., ...})")
        return _PyroAdapter(optim)
    if isinstance(optim, type) and issubclass(optim, torch.optim.Optimizer):
        example = f"lambda params: {optim.__name__}(params, lr=1e-3)"
        raise TypeError(f"optim is the class {optim.__name__}: pass a function that makes one, {example}")
    if not callable(optim) and not isinstance(optim, Optimizer):
        raise TypeError(f"optim must be a torch or Pyro optimiser, or a function of a list of parameters, not {optim!r}")
    return _TorchAdapter(optim, scheduler)
