"""The tensors that programs train or keep: found by running the programs, under names that are equal in every process.

Parameters are those of ``pyro.param`` statements and registered modules, by their names in Pyro's store; those of modules that a
program is, or is a method of; and those of modules that it calls without registering them. Buffers are those of all these
modules. It knows programs and Pyro's parameter store, and no losses or optimisers.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_kd.errors import ArchitectureMismatchError, CheckpointError, InvalidParameterError
from pyro_kd.isolation.modes import evaluation_mode, hooked
from pyro_kd.isolation.programs import owners
from pyro_kd.sites.tracing import displaced_params, params_of
from pyro_kd.utils.display import describe_tensor
from pyro_kd.utils.pyro_internals import constraint_in_store, constraints_of_module, dotted_name, unconstrained_params
from pyro_kd.utils.randomness import keeping_random_state
from pyro_kd.utils.torch_internals import persistent_tensors

__all__ = ["ProgramState"]


class ProgramState:
    """Names and current tensors of programs, as found in all runs so far.

    Attributes:
        module: the first program's module, where it is one or a method of one.
        displaced: the programs' own tensors in whose place Pyro's store held others in the last run, by name.
    """

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.displaced: dict[str, Tensor] = {}
        self._params: dict[str, Tensor] = {}  # of pyro.param statements, by name
        self._modules: dict[nn.Module, None] = {}
        self._seen: tuple[list[int], list[bool]] = [], []

    def discover(self, runs: Iterable[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]) -> None:
        """Run each program once on its arguments, without changing it or the random streams, and add what it reaches."""
        self.displaced = {}
        with keeping_random_state():
            for program, args, kwargs in runs:
                for owner in owners(program):
                    if isinstance(owner, nn.Module):
                        self.module = self.module or owner
                        self._modules.update(dict.fromkeys(owner.modules()))
                with hooked(lambda module, _: self._modules.setdefault(module)), evaluation_mode(program), poutine.block():
                    trace = poutine.trace(program).get_trace(*args, **kwargs)
                self._params |= {dotted_name(name): value for name, value in params_of(trace).items()}
                self.displaced |= displaced_params(trace)
        self._seen = self._now()

    def adopt(self, tensors: Iterable[Tensor], modules: Iterable[nn.Module]) -> None:
        """Add parameters that a run has reached: a program may make or use them on a path that no discovery has taken.

        Args:
            tensors: leaf tensors, of any shapes. Those that are neither in Pyro's store nor in one of the modules are left out.
            modules: those that the programs reach.
        """
        wanted = set(tensors)
        stored = unconstrained_params(pyro.get_param_store())
        for name, tensor in stored.items():  # in an order that is equal in every process
            if tensor in wanted:
                self._params[dotted_name(name)] = tensor
                wanted.remove(tensor)
        for module in modules:
            if not wanted.isdisjoint(module.parameters(recurse=False)):
                self._modules.setdefault(module)

    def _now(self) -> tuple[list[int], list[bool]]:
        """Which tensors and modules are in the modules and in Pyro's store, and which of the tensors require gradients."""
        tensors: list[Tensor] = [
            tensor for module in self._modules for tensor in module._parameters.values() if tensor is not None
        ]
        tensors += unconstrained_params(pyro.get_param_store()).values()
        parts = [part for module in self._modules for part in module._modules.values()]
        return [*map(id, tensors), *map(id, parts)], [tensor.requires_grad for tensor in tensors]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name; what has several, such as a tied weight, by the first in alphabetical order."""
        names = dict[Tensor, str]()
        for name, tensor in self._params.items():
            names[tensor] = min(name, names.get(tensor, name))
        named = {name: tensor for tensor, name in names.items()}
        known = set(names)
        for index, module in enumerate(self._modules):
            for name, tensor in persistent_tensors(module).items():
                if tensor not in known:
                    known.add(tensor)
                    named[_name_in_module(index, module, name)] = tensor
        return named

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that were found."""
        return list(self._modules)

    def buffers(self, *, persistent: bool) -> list[tuple[dict[str, Any], str]]:
        """Where the buffers of a checkpoint are, or all others, as dictionary and key: a run may replace one by another tensor."""
        modules = dict.fromkeys(part for module in self._modules for part in module.modules())
        return [
            (module._buffers, name)
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None and (name not in module._non_persistent_buffers_set) == persistent
        ]

    def constraints(self) -> dict[str, str]:
        """The constraints of the parameters in Pyro's store, as text."""
        return {name: str(constraint_in_store(key)) for name, key in self._stored().items()}

    @torch.no_grad()
    def check(self) -> None:
        """Raise InvalidParameterError where a trained parameter is not finite, or its value violates its constraint."""
        for name, tensor in self.trainable.items():
            if not tensor.isfinite().all():
                raise InvalidParameterError(f"parameter {name!r} is NaN or infinite.")
        store = pyro.get_param_store()
        constrained = {name: (store[key], constraint_in_store(key)) for name, key in self._stored().items()}
        for index, module in enumerate(self._modules):
            for name, constraint in constraints_of_module(module).items():
                constrained[_name_in_module(index, module, name)] = getattr(module, name), constraint
        for name, (value, constraint) in constrained.items():
            if not (value.isfinite().all() and constraint.check(value).all()):
                raise InvalidParameterError(
                    f"parameter {name!r} has reached the boundary of its constraint {constraint}: it holds "
                    f"{value.flatten()[:3].tolist()}{'...' if value.numel() > 3 else ''}."
                )

    def _stored(self) -> dict[str, str]:
        """The keys of parameters in Pyro's store, by name."""
        store = pyro.get_param_store()
        keys = {name: store.param_name(tensor) for name, tensor in self._params.items()}
        return {name: key for name, key in keys.items() if key is not None}

    @property
    def identities(self) -> list[int]:
        """Which tensors and modules were there in the last discovery."""
        return self._seen[0]

    @property
    def is_current(self) -> bool:
        """Whether the same tensors as in the last discovery are there, and the same ones require gradients."""
        return self._seen == self._now()

    @property
    def trainable(self) -> dict[str, Tensor]:
        """The parameters that require gradients."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    def values(self) -> dict[str, Tensor]:
        """Copies of all tensors on the CPU, by name; constrained parameters as they are before their constraint."""
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.tensors.items()}

    def portable(self) -> dict[str, Any]:
        """The tensors in the form that plain torch or plain Pyro loads: a module's ``state_dict``, or the state of a parameter store.

        Raises:
            CheckpointError: neither form holds all of them.
        """
        own = {} if self.module is None else self.module.state_dict(keep_vars=True)
        held = {id(tensor) for tensor in own.values()}
        outside = [name for name, tensor in self.tensors.items() if id(tensor) not in held]
        if not outside:
            return {name: tensor.detach() for name, tensor in own.items()}
        store = pyro.get_param_store()
        entries = {store.param_name(tensor): tensor.detach() for tensor in self.tensors.values()}
        if None not in entries:
            return {"params": entries, "constraints": {name: constraint_in_store(str(name)) for name in entries}}
        raise CheckpointError(
            f"{', '.join(map(repr, outside[:5]))} of the student is not in its module, and Pyro's parameter store does not hold "
            "everything, so a file of either would lose something. Write everything: save_student('student.safetensors')."
        )

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor], source: str, *, partly: bool = False) -> None:
        """Give the tensors the values of :meth:`values`.

        Args:
            values: by name.
            source: where they come from, for the error.
            partly: whether tensors without a value stay as they are; otherwise they are an error.

        Raises:
            ArchitectureMismatchError: see :meth:`check_fits`; nothing is changed.
        """
        self.check_fits(values, source, partly=partly)
        tensors = self.tensors
        for name, value in values.items():
            tensors[name].copy_(value)

    def check_fits(self, values: Mapping[str, Tensor], source: str, *, partly: bool = False) -> None:
        """Raise ArchitectureMismatchError where a name is missing or unknown, or its shape or type differs."""
        tensors = self.tensors
        wrong = [f"{name!r} is missing in the checkpoint" for name in tensors if name not in values and not partly]
        wrong += [f"{name!r} is not in the student" for name in values if name not in tensors]
        for name, tensor in tensors.items():
            if name in values and (values[name].shape != tensor.shape or values[name].dtype != tensor.dtype):
                wrong.append(
                    f"{name!r} is {describe_tensor(values[name])} in the checkpoint and {describe_tensor(tensor)} in the student"
                )
        if wrong:
            raise ArchitectureMismatchError(
                f"{source} is of a different architecture: {'; '.join(wrong)}. Build the student as it was when the checkpoint was "
                "written, and run it once where it makes parameters later than in its first run; or train into a different folder."
            )


def _name_in_module(index: int, module: nn.Module, name: str) -> str:
    """The name of a tensor that is not in Pyro's store: by the place of its module among those that were found."""
    return f"module {index} ({type(module).__name__}).{name}"
