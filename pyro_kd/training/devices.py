"""Whether a device exists, before anything is moved to it."""

from typing import Any

import torch

from pyro_kd.errors import MissingDeviceError
from pyro_kd.training.processes.group import is_launched, local_rank

__all__ = ["device_of_process", "require_device"]


def device_of_process(device: Any) -> Any:
    """The GPU of this process where ``torchrun`` has started several and the user asks for ``"cuda"``; any other device as it is."""
    if str(device) != "cuda" or not is_launched():
        return device
    if local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())  # which NCCL needs
    return f"cuda:{local_rank()}"


def require_device(device: Any) -> None:
    """Raise MissingDeviceError if no tensor can be made on a device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # torch has no specific error for it
        there = ["'cpu'", *(f"'cuda:{index}'" for index in range(torch.cuda.device_count()))]
        there += ["'mps'"] if torch.backends.mps.is_available() else []
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingDeviceError(f"device={device!r} is not there ({reason}). There is {', '.join(there)}.") from error
