"""Every private name of torch that this package uses, so that a release which renames one is met here and nowhere else."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "FakeTensorMode",
    "TorchDispatchMode",
    "TracingContext",
    "copy_all_",
    "get_decompositions",
    "hooks_on_all_modules",
    "mark_static_address",
    "options_of_mode",
    "scaled",
    "storage_id",
    "tracing",
    "tree_flatten",
    "tree_unflatten",
]


def hooks_on_all_modules() -> list[dict[Any, Any]]:
    """The dictionaries that hold torch's hooks on all modules."""
    names = vars(torch.nn.modules.module)
    return [held for name, held in names.items() if name.startswith("_global_") and isinstance(held, dict)]


def storage_id(tensor: Tensor) -> int:
    """A number of a tensor's memory: equal for tensors that share it."""
    return int(tensor.untyped_storage()._cdata)


def scaled(tensors: list[Tensor], factor: float | Tensor) -> list[Tensor]:
    """Copies of tensors of any shapes, times a number or a scalar, in one launch."""
    return list(torch._foreach_mul(tensors, factor)) if tensors else []


def copy_all_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors into others of the same shapes, in one launch."""
    torch._foreach_copy_(targets, sources)


def options_of_mode(mode: str) -> Mapping[str, Any]:
    """What a mode of ``torch.compile`` sets."""
    options: Mapping[str, Any] = torch._inductor.list_mode_options(mode)
    return options


def mark_static_address(tensor: Tensor) -> None:
    """Tell ``torch.compile`` that a tensor stays where it is in memory."""
    torch._dynamo.mark_static_address(tensor)
