"""The tensors that a run uses besides its arguments: where to find each in a later call, and how to undo writes to them.

A module may get a different tensor under the same name (``load_state_dict(assign=True)``, ``to()`` for buffers), and so may Pyro's
parameter store. So tensors of modules and of the store are looked up by their names in every call. All other tensors are held
themselves.

Knows modules and the parameter store, but no graphs.
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
        """The tensor that is currently there.

        Raises:
            KeyError: the holder no longer has the name.
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

    As a context manager, it notes the modules that are called inside the context.

    Args:
        modules: modules that are known beforehand; the programs may use them without calling them, as in ``norm.normalise(x)``.
        tensors: further tensors of any shapes that the programs may write to.
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
        """Note further modules and tensors, of any shapes, with their current values."""
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
        """The names of buffers that a run has replaced by a different tensor."""
        return self._kept.replaced

    def restore(self) -> None:
        """Restore the values of the tensors, and put replaced buffers back."""
        self._kept.restore()

    def places(self) -> tuple[list[Place], list[tuple[Place, Place]]]:
        """Where the reached tensors live, each once; and the pairs of places that hold the same tensor, such as tied weights."""
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
