"""The tensors that programs train or keep: found by running them, under names that are the same in every process.

Parameters are ``pyro.param`` statements and registered modules, by their names in Pyro's store; those of modules that a
program is, or is a method of; and those of modules that it calls without registering them. Buffers are those of all these
modules.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_kd.errors import ArchitectureMismatchError, CheckpointError, InvalidParameterError
from pyro_kd.isolation.modes import evaluation_mode, hooked
from pyro_kd.losses.checks import params_of
from pyro_kd.losses.module import owners
from pyro_kd.utils.randomness import RandomState

__all__ = ["ProgramState"]


class ProgramState:
    """Names and tensors of programs: what was found in any run, as it is now.

    Attributes:
        module: the first program's module, where it is one or a method of one.
    """

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self._params: dict[str, Tensor] = {}  # of pyro.param statements, by name
        self._modules: dict[nn.Module, None] = {}
        self._store_size = -1

    def discover(self, runs: Iterable[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]) -> None:
        """Run each program once on its arguments, without changing it or the random streams, and add what it reaches."""
        before = RandomState.now()
        for program, args, kwargs in runs:
            for owner in owners(program):
                if isinstance(owner, nn.Module):
                    self.module = self.module or owner
                    self._modules.update(dict.fromkeys(owner.modules()))
            with hooked(lambda module, _: self._modules.setdefault(module)), evaluation_mode(program), poutine.block():
                trace = poutine.trace(program).get_trace(*args, **kwargs)
            self._params |= {name.replace("$$$", "."): value for name, value in params_of(trace).items()}
        before.restore()
        self._store_size = len(pyro.get_param_store())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name."""
        named = dict(self._params)
        known = set(named.values())
        for index, module in enumerate(self._modules):
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                if tensor not in known and name not in module._non_persistent_buffers_set:
                    known.add(tensor)
                    named[f"module {index} ({type(module).__name__}).{name}"] = tensor
        return named

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that were found."""
        return list(self._modules)

    def constraints(self) -> dict[str, str]:
        """The constraints of the parameters in Pyro's store, as text."""
        store = pyro.get_param_store()
        return {name: str(store._constraints[key]) for name, key in self._stored().items()}

    @torch.no_grad()
    def check(self) -> None:
        """Raise InvalidParameterError where a trained parameter is not finite, or its value outside of its constraint."""
        for name, tensor in self.trainable.items():
            if not tensor.isfinite().all():
                raise InvalidParameterError(f"parameter {name!r} is NaN or infinite.")
        store = pyro.get_param_store()
        constrained = {name: (store[key], store._constraints[key]) for name, key in self._stored().items()}
        for index, module in enumerate(self._modules):
            for name, (constraint, _) in module._pyro_params.items() if isinstance(module, PyroModule) else ():
                constrained[f"module {index} ({type(module).__name__}).{name}"] = getattr(module, name), constraint
        for name, (value, constraint) in constrained.items():
            if not (value.isfinite().all() and constraint.check(value).all()):
                raise InvalidParameterError(
                    f"parameter {name!r} has reached the end of its constraint {constraint}: it holds "
                    f"{value.flatten()[:3].tolist()}{'...' if value.numel() > 3 else ''}."
                )

    def _stored(self) -> dict[str, str]:
        """The keys of parameters in Pyro's store, by name."""
        store = pyro.get_param_store()
        keys = {name: store.param_name(tensor) for name, tensor in self._params.items()}
        return {name: key for name, key in keys.items() if key is not None}

    @property
    def is_current(self) -> bool:
        """Whether Pyro's store has had no new entry since the last discovery."""
        return self._store_size == len(pyro.get_param_store())

    @property
    def trainable(self) -> dict[str, Tensor]:
        """The parameters that require gradients."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    def values(self) -> dict[str, Tensor]:
        """Copies of all tensors on the CPU, by name; constrained parameters before their constraint."""
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.tensors.items()}

    def portable(self) -> dict[str, Any]:
        """The tensors as plain torch or plain Pyro loads them: a module's ``state_dict``, or the state of a parameter store.

        Raises:
            CheckpointError: some are in neither.
        """
        own = {} if self.module is None else self.module.state_dict(keep_vars=True)
        held = {id(tensor) for tensor in own.values()}
        outside = [name for name, tensor in self.tensors.items() if id(tensor) not in held]
        if not outside:
            return {name: tensor.detach() for name, tensor in own.items()}
        store = pyro.get_param_store()
        entries = {store.param_name(tensor): tensor.detach() for tensor in self.tensors.values()}
        if None not in entries:
            return {"params": entries, "constraints": {name: store._constraints[str(name)] for name in entries}}
        raise CheckpointError(
            f"{', '.join(map(repr, outside[:5]))} of the student is not in its module, and not all is in Pyro's parameter store, so "
            "that a file of either would lose something. Write everything: save_student('student.safetensors')."
        )

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor], source: str, *, partly: bool = False) -> None:
        """Give the tensors the values of :meth:`values`.

        Args:
            values: by name.
            source: where they come from, for the error.
            partly: whether tensors without a value stay as they are.

        Raises:
            ArchitectureMismatchError: as :meth:`check_fits`; nothing is changed.
        """
        self.check_fits(values, source, partly=partly)
        tensors = self.tensors
        for name, value in values.items():
            tensors[name].copy_(value)

    def check_fits(self, values: Mapping[str, Tensor], source: str, *, partly: bool = False) -> None:
        """Raise ArchitectureMismatchError where a name is missing, is not known, or has another shape or type."""
        tensors = self.tensors
        wrong = [f"{name!r} is missing in the checkpoint" for name in tensors if name not in values and not partly]
        wrong += [f"{name!r} is not in the student" for name in values if name not in tensors]
        for name, tensor in tensors.items():
            if name in values and (values[name].shape != tensor.shape or values[name].dtype != tensor.dtype):
                wrong.append(
                    f"{name!r} is {_describe(values[name])} in the checkpoint and {_describe(tensor)} in the student"
                )
        if wrong:
            raise ArchitectureMismatchError(
                f"{source} is of another architecture: {'; '.join(wrong)}. Build the student as it was when the checkpoint was "
                "written, or train into another folder."
            )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
