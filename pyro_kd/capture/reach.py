"""The tensors that a run computes with and was not given: how to find each again at a later call, and how to undo writes to them.

A module may get another tensor under the same name (``load_state_dict(assign=True)``, ``to()`` for buffers), and so may a
name in Pyro's parameter store. So tensors of modules and of the store are looked up by their names in every call; what is
in neither is held itself.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from pyro_kd.utils.tensors import same_values

__all__ = ["Place", "Reach"]


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a tensor lives: ``holder[name]``; the holder's dictionary is the one that its owner writes to."""

    holder: Mapping[str, Any]
    name: str

    def tensor(self) -> Any:
        """The tensor that is there now.

        Raises:
            KeyError: the name is gone.
        """
        return self.holder[self.name]


class _Store(Mapping[str, Tensor]):
    """The unconstrained entries of Pyro's parameter store, whose own dictionary is another one after ``clear()``."""

    def __getitem__(self, name: str) -> Tensor:
        return pyro.get_param_store()._params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(pyro.get_param_store()._params)

    def __len__(self) -> int:
        return len(pyro.get_param_store()._params)


class Reach:
    """The modules of runs, with their parameters and buffers, and the entries of Pyro's parameter store.

    As a context manager, notes the modules that are called meanwhile.

    Args:
        modules: those known beforehand; the programs may use them without a call, as in ``norm.normalise(x)``.
        tensors: others that the programs may write to.
    """

    def __init__(self, modules: Iterable[nn.Module] = (), tensors: Iterable[Tensor] = ()) -> None:
        self.modules: dict[nn.Module, None] = {}
        self._before: dict[Tensor, Tensor] = {}
        self._buffers: list[tuple[dict[str, Any], str, Any]] = []
        self.reassigned: set[str] = set()
        inner = [part for module in modules for part in module.modules()]
        self.add(inner, [*tensors, *pyro.get_param_store()._params.values()])

    def _add(self, module: nn.Module) -> None:
        if module not in self.modules:
            self.modules[module] = None
            for name, buffer in module._buffers.items():
                self._buffers.append((module._buffers, name, buffer))
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                self._keep(tensor)

    def _keep(self, tensor: Tensor | None) -> None:
        if tensor is None or tensor in self._before or is_lazy(tensor):
            return
        if tensor.layout == torch.strided and tensor.device.type != "meta":
            self._before[tensor] = tensor.detach().clone()

    def __enter__(self) -> "Reach":
        self._hook = register_module_forward_pre_hook(lambda module, _: self._add(module))
        return self

    def __exit__(self, *exc: object) -> None:
        self._hook.remove()

    @torch.no_grad()
    def restore(self) -> None:
        """Give the tensors back the values that they had before the run, and note buffers that the run has put others in place of."""
        for holder, name, tensor in self._buffers:
            if name not in holder or holder[name] is not tensor:
                self.reassigned.add(name)
                holder[name] = tensor
        for tensor, value in self._before.items():
            if not same_values(tensor, value):
                tensor.copy_(value)

    def add(self, modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> None:
        """Take note of others, as they are now."""
        for module in modules:
            self._add(module)
        for tensor in tensors:
            self._keep(tensor)

    def places(self) -> tuple[list[Place], list[tuple[Place, Place]]]:
        """Where the reached tensors live, each once; and the pairs of places in modules that hold one tensor, as tied weights do."""
        found: dict[int, Place] = {}
        ties = []
        holders: list[Any] = [held for module in self.modules for held in (module._parameters, module._buffers)]
        for holder in [*holders, _Store()]:
            for name, tensor in holder.items():
                if isinstance(tensor, Tensor):
                    place = found.setdefault(id(tensor), Place(holder, name))
                    if isinstance(holder, dict) and (place.holder is not holder or place.name != name):
                        ties.append((place, Place(holder, name)))
        return list(found.values()), ties
