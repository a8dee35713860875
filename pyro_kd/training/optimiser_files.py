"""The file with an optimiser's state: tensors and plain values, read from a file that anybody may have written.

``torch.load(weights_only=True)`` runs no code. But a small file can hold what is large when it is used: compressed parts, a tensor
that repeats one number a billion times, or lists that hold one list again and again. Nothing of that is in a file that torch has
written, and it is refused before it is used. Knows files, and no optimisers.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["read_optimiser"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_DEEPEST = 64
_LARGEST = 10
"""How many values, in each place where they stand, a file may hold for each of its bytes."""


def read_optimiser(file: Path) -> dict[str, Any]:
    """Read the state of an optimiser.

    Args:
        file: a regular file.

    Returns:
        The state. Its tensors, of any shapes, are on the CPU.

    Raises:
        ValueError: it holds more than tensors and plain values, or is larger than the file.
        Exception: of other types, from torch.
    """
    size = file.stat().st_size
    with zipfile.ZipFile(file) as parts:
        for part in parts.infolist():
            if part.compress_type != zipfile.ZIP_STORED or part.file_size > size:
                raise ValueError("it is compressed")
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError("it holds no mapping")
    _check(state, size)
    return state


def _check(state: dict[Any, Any], size: int) -> None:
    """Raise ValueError where a state is not plain, or is larger than its file.

    Args:
        state: the state.
        size: of the file, in bytes.
    """
    num_values = num_bytes = 0
    waiting: list[tuple[Any, int]] = [(state, 0)]
    while waiting:
        value, depth = waiting.pop()
        num_values += 1
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_quantized:
                raise ValueError("it holds a tensor of an unusual kind")
            if value.device.type != "cpu":
                raise ValueError("it holds a tensor without values")
            num_bytes += value.numel() * value.element_size()
        elif isinstance(value, dict):
            waiting += [(part, depth + 1) for item in value.items() for part in item]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += [(part, depth + 1) for part in value]
        elif not isinstance(value, _PLAIN):
            raise ValueError(f"it holds a {type(value).__name__}")
        if depth > _DEEPEST or num_values > _LARGEST * size or num_bytes > _LARGEST * size:
            raise ValueError("what it holds is larger than the file")
