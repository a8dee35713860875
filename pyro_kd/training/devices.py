"""Whether a device exists, before anything is moved to it."""

from typing import Any

import torch

from pyro_kd.errors import MissingDeviceError

__all__ = ["require_device"]


def require_device(device: Any) -> None:
    """Raise MissingDeviceError if no tensor can be made on a device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # torch has no specific error for it
        there = ["'cpu'", *(f"'cuda:{index}'" for index in range(torch.cuda.device_count()))]
        there += ["'mps'"] if torch.backends.mps.is_available() else []
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingDeviceError(f"device={device!r} is not there ({reason}). There is {', '.join(there)}.") from error
