"""The parameters that a student reaches and does not hold itself, as a module that an optimiser can take them from."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from pyro_kd.isolation.reaching import Reached

__all__ = ["ReachedParameters"]


class ReachedParameters(nn.Module):
    """Modules, and leaf tensors that require gradients, by names that tell where the student has them from."""

    def find(self, student: Any, others: Iterable[nn.Module]) -> None:
        """Add what a student reaches now, and is not known.

        Args:
            student: the program.
            others: modules that are known from elsewhere.
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
        """Add leaf tensors, as ``pyro.param`` has them, which are no ``nn.Parameter``."""
        for name, tensor in params.items():
            self._parameters[self._key(name)] = tensor  # type: ignore[assignment]

    def _key(self, name: str) -> str:
        """A name that is free; one of PyTorch's has no dots."""
        key = name.replace("$$$", ".").replace(".", "_")
        while hasattr(self, key):
            key += "_"
        return key
