"""Checks of a checkpoint's entries before any of them is used: their types, and that they are consistent."""

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_kd.errors import CheckpointError

__all__ = ["check_values", "keys_of", "place_keys_of"]


def keys_of(rank: int) -> tuple[str, str]:
    """The names under which the random states of a process are kept: now, and at the start of the epoch."""
    return ("random", "epoch") if rank == 0 else (f"process {rank} random", f"process {rank} epoch")


def place_keys_of(rank: int) -> tuple[str, str]:
    """The names under which the place of a process in its batches is kept: how many it has taken, and their order."""
    return ("batches_taken", "order") if rank == 0 else (f"process {rank} batches_taken", f"process {rank} order")


def check_values(step: Any, values: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError where the values of a checkpoint are not what a training run writes.

    Args:
        step: number of optimisation steps.
        values: those of a :class:`~pyro_kd.training.checkpoints.Checkpoint`.
        tensors: those of the same checkpoint, by name.
        path: of the checkpoint, for the error.
    """
    _require(_is_count(step), path, "its step is no number of steps")
    _require(isinstance(values, dict), path, "its values are no mapping")
    for name, holds in _ENTRIES.items():
        _require(name in values and holds(values[name]), path, f"its value {name!r} is missing or has a wrong type")
    _require(values["begin"] <= step, path, "its fit began after its end")
    columns = values["columns"]
    _require(
        all(f"history/{name}" in tensors for name in columns)
        and all(tensors[f"history/{name}"].shape == (step,) for name in columns)
        and all(tensors[f"history/{name}"].dtype == torch.float64 for name in columns),
        path,
        f"its history does not have {step} steps",
    )
    has_best = any(name.startswith("best/") for name in tensors)
    _require(has_best == (values["best"] is not None), path, "its best student is not complete")
    processes = values.get("processes", 1)
    _require(_is_count(processes) and processes >= 1, path, "its number of processes is none")
    for taken, order in (map(values.get, place_keys_of(rank)) for rank in range(processes)):
        _require(taken is None or _is_count(taken), path, "its number of batches is none")
        _require((taken or 0) <= _MOST_BATCHES * (step + 1), path, "it has taken more batches than its steps can")
        _require(order is None or _is_order(order), path, "its order is none")
    _require(_is_scale(values.get("loss_scale")), path, "its scale of the loss is no scale")
    for key in (key for rank in range(processes) for key in keys_of(rank)):
        _require(key in values, path, f"its value {key!r} is missing")
        if values[key] is not None:
            _require(isinstance(values[key], dict), path, f"its {key} state is no state of a random generator")
            states = {name.removeprefix(f"{key}/"): state for name, state in tensors.items() if name.startswith(f"{key}/")}
            _require(_is_random_state(values[key], states), path, f"its {key} state is no state of a random generator")


def _require(holds: bool, path: Path, what: str) -> None:
    if not holds:
        raise CheckpointError(f"{path} is damaged: {what}.")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_order(value: Any) -> bool:
    return isinstance(value, list) and list(map(_is_count, value)) == [True, True]


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "batches_taken": _is_count,
    "begin": _is_count,
    "best": lambda value: value is None or _is_finite(value),
    "stale": _is_count,
    "columns": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "constraints": _is_texts,
    "fingerprint": _is_texts,
    "optimiser": lambda value: isinstance(value, str),
    "random": lambda value: value is None or isinstance(value, dict),
    "epoch": lambda value: value is None or isinstance(value, dict),
}


def _is_scale(value: Any) -> bool:
    names = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    return value is None or (isinstance(value, dict) and value.keys() == names and all(map(_is_finite, value.values())))


_MOST_BATCHES = 10_000
"""In one step."""


def _is_random_state(state: dict[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether newly made generators accept the state. NumPy's does not check its position, and would read beyond its numbers."""
    try:
        version, numbers, gauss = state["python"]
        random.Random().setstate((version, tuple(numbers), gauss))
        name, keys, *rest = state["numpy"]
        np.random.RandomState().set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.Generator().set_state(tensors["cpu"])
        are_states = all(_is_state(key, tensor) for key, tensor in tensors.items())
        return are_states and name == "MT19937" and len(keys) == 624 and type(rest[0]) is int and 0 <= rest[0] <= 624
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError, OverflowError):
        return False


def _is_state(key: str, state: Tensor) -> bool:
    """Whether a tensor may be the state of a generator. Those of GPUs are checked there."""
    kind, _, name = key.partition(" ")
    if state.dtype != torch.uint8 or state.dim() != 1 or (kind == "cuda" and not name.isdecimal()):
        return False
    if kind == "generator" and state.shape == torch.Generator().get_state().shape:
        torch.Generator().set_state(state)
    return kind in ("cpu", "cuda", "generator")
