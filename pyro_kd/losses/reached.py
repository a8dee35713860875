"""The parameters that a student reaches but does not hold itself, collected in a module for the optimiser."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from pyro_kd.isolation.reaching import Reached
from pyro_kd.utils.pyro_internals import dotted_name

__all__ = ["ReachedParameters"]


class ReachedParameters(nn.Module):
    """Modules, and leaf tensors that require gradients, by names that tell where the student reaches them."""

    def find(self, student: Any, others: Iterable[nn.Module]) -> None:
        """Add the modules and parameters that a student reaches now and that are not known yet.

        Args:
            student: the program.
            others: modules that are already registered elsewhere, and are left out.
        """
        found = Reached(student)
        known = {*others, *self.modules()}
        for module, name in found.roots.items():
            if module not in known:
                self.add_module(self._key(name or type(module).__name__), module)
        held = {param for module in {*known, *self.modules()} for param in module._parameters.values() if param is not None}
        params = found.parameters()
        self.add({name: tensor for tensor, name in params.items() if tensor in found.tensors and tensor not in held})

    def add(self, params: Mapping[str, Tensor]) -> None:
        """Add leaf tensors, of any shapes, that are not an ``nn.Parameter``, such as those of ``pyro.param``."""
        for name, tensor in params.items():
            self._parameters[self._key(name)] = tensor  # type: ignore[assignment]

    def _key(self, name: str) -> str:
        """A name that is not taken, without dots, which PyTorch does not allow."""
        key = dotted_name(name).replace(".", "_")
        while hasattr(self, key):
            key += "_"
        return key
