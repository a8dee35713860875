"""Mixed precision in training: networks in bfloat16 or float16, parameters, losses and updates in float32.

Micikevicius et al., Mixed Precision Training, ICLR 2018. The names are those of Lightning and Fabric.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_kd.errors import MissingDeviceError

__all__ = ["PRECISIONS", "Precision"]

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The type that networks compute in, by name."""

_DEVICES_OF_FLOAT16 = ("cuda",)


class Precision:
    """How networks compute.

    Args:
        name: one of :data:`PRECISIONS`; None is ``"32-true"``.

    Attributes:
        name: the same.
        scaler: scales losses so that float16 gradients do not vanish; None where that is not needed.

    Raises:
        ValueError: there is no such precision.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None and name not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, not {name!r}")
        self.name = name or "32-true"
        self.scaler: torch.amp.GradScaler | None = None
        self._type = PRECISIONS[self.name]
        self._devices: tuple[str, ...] = ()
        self._holder: torch.optim.Optimizer | None = None

    def bind(self, params: Mapping[str, Tensor]) -> None:
        """Take note of the devices of what is trained.

        Raises:
            MissingDeviceError: float16 is asked for, and a parameter is not on a GPU.
        """
        self._devices = tuple(dict.fromkeys(param.device.type for param in params.values()))
        if self._type is not torch.float16:
            return
        for name, param in params.items():
            if param.device.type not in _DEVICES_OF_FLOAT16:
                raise MissingDeviceError(
                    f"precision='16-mixed' is for CUDA devices, and parameter {name!r} is on {str(param.device)!r}: pass "
                    "device='cuda', or precision='bf16-mixed', which needs no GPU."
                )
        if self.scaler is None:
            self.scaler = torch.amp.GradScaler(self._devices[0])
        self._holder = torch.optim.SGD([*params.values()], lr=0.0)  # the scaler looks for gradients in an optimiser

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Run networks in this precision inside the context."""
        with ExitStack() as stack:
            for device in self._devices if self._type is not None else ():
                stack.enter_context(torch.autocast(device, self._type))
            yield

    def scaled(self, value: Tensor) -> Tensor:
        """What to differentiate in place of a loss."""
        if self.scaler is None:
            return value
        scaled: Tensor = self.scaler.scale(value)
        return scaled

    def unscale(self, params: Mapping[str, Tensor]) -> bool:
        """Undo the scale in the gradients, and adapt it. Returns whether they are finite, so that the step may be taken."""
        if self.scaler is None or self._holder is None:
            return True
        self.scaler.unscale_(self._holder)
        is_finite = all(bool(param.grad.isfinite().all()) for param in params.values() if param.grad is not None)
        self.scaler.update()
        return is_finite

    def state(self) -> dict[str, Any] | None:
        """The state of the scale; None where there is none."""
        return None if self.scaler is None else self.scaler.state_dict()

    def load(self, state: dict[str, Any] | None) -> None:
        """Load what :meth:`state` has returned."""
        if self.scaler is not None and state is not None:
            self.scaler.load_state_dict(state)
