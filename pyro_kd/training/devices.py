"""Which GPU is that of a process."""

from typing import Any

import torch

from pyro_kd.training.processes.group import is_launched, local_rank

__all__ = ["device_of_process"]


def device_of_process(device: Any) -> Any:
    """The GPU of this process where ``torchrun`` has started several and the user asks for ``"cuda"``; any other device as it is."""
    if str(device) != "cuda" or not is_launched():
        return device
    if local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())  # which NCCL needs
    return f"cuda:{local_rank()}"
