"""The tensors that a run computes with and was not given: where each is found at a later call, and how writes to them are undone.

A module may get a different tensor under the same name (``load_state_dict(assign=True)``, ``to()`` for buffers), and so may a
name in Pyro's parameter store. So tensors of modules and of the store are looked up by their names in every call. What is
in neither is held itself.

Knows modules and the parameter store, and no graphs.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_kd.isolation.modes import KeptTensors
from pyro_kd.utils.pyro_internals import unconstrained_params

__all__ = ["Place", "ReachedState"]


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a tensor lives: ``holder[name]``. The holder's dictionary is the one that its owner writes to."""

    holder: Mapping[str, Any]
    name: str

    @classmethod
    def of(cls, tensor: Tensor) -> "Place":
        """The place of a tensor that is held itself."""
        return cls({"": tensor}, "")

    def tensor(self) -> Any:
        """The tensor that is there now.

        Raises:
            KeyError: the name is gone.
        """
        return self.holder[self.name]


class _Store(Mapping[str, Tensor]):
    """The unconstrained entries of Pyro's parameter store, which has a different dictionary after ``clear()``."""

    def __getitem__(self, name: str) -> Tensor:
        return unconstrained_params(pyro.get_param_store())[name]

    def __iter__(self) -> Iterator[str]:
        return iter(unconstrained_params(pyro.get_param_store()))

    def __len__(self) -> int:
        return len(unconstrained_params(pyro.get_param_store()))


class ReachedState:
    """The modules of runs, with their parameters and buffers, and the entries of Pyro's parameter store.

    As a context manager, notes the modules that are called meanwhile.

    Args:
        modules: those known beforehand; the programs may use them without a call, as in ``norm.normalise(x)``.
        tensors: others that the programs may write to, of any shapes.
    """

    def __init__(self, modules: Iterable[nn.Module] = (), tensors: Iterable[Tensor] = ()) -> None:
        self.modules: dict[nn.Module, None] = {}
        self._kept = KeptTensors()
        inner = [part for module in modules for part in module.modules()]
        self.add(inner, [*tensors, *unconstrained_params(pyro.get_param_store()).values()])

    def __enter__(self) -> "ReachedState":
        self._hook = register_module_forward_pre_hook(lambda module, _: self._add(module))
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()

    def add(self, modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> None:
        """Take note of others, as they are now."""
        for module in modules:
            self._add(module)
        for tensor in tensors:
            self._kept.keep(tensor)

    def _add(self, module: nn.Module) -> None:
        if module not in self.modules:
            self.modules[module] = None
            self._kept.add(module)
            for parameter in module._parameters.values():
                self._kept.keep(parameter)

    @property
    def replaced(self) -> set[str]:
        """The names of buffers in whose place a run has put a different tensor."""
        return self._kept.replaced

    def restore(self) -> None:
        """Give the tensors back the values, and the buffers the places, that they had before the runs."""
        self._kept.restore()

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
