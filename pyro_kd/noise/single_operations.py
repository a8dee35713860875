"""Inverse distribution functions as single operations, for as long as a graph is being traced.

Each of them is some hundred plain operations, the same ones at every site, and torch spends milliseconds on tracing an operation. So
a program is traced with one operation in their place, such as ``torch.ops.pyro_kd.gamma_icdf``. The export puts the plain operations
there at the end (:mod:`pyro_kd.export.inlining`). Knows tensors only.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_kd.noise.inverse_functions import binomial_icdf, gamma_icdf, poisson_icdf

__all__ = ["function_of", "single_operation"]

_NAMESPACE = "pyro_kd"
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (gamma_icdf, poisson_icdf, binomial_icdf)}


def single_operation(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Call an inverse distribution function as one operation.

    Args:
        function: one of :mod:`pyro_kd.noise.inverse_functions`.
        *args: its arguments, of any shapes that broadcast.

    Returns:
        float64 tensor of the broadcast shape.
    """
    value: Tensor = _operation(function)(*torch.broadcast_tensors(*(x.double() for x in args)))
    return value


def function_of(operation: Any) -> Callable[..., Tensor] | None:
    """The function that an operation of a graph stands for, which takes float64 tensors of one shape; None for all others."""
    namespace, _, name = str(operation).partition(".")
    return _FUNCTIONS.get(name.removesuffix(".default")) if namespace == _NAMESPACE else None


@functools.cache
def _operation(function: Callable[..., Tensor]) -> Any:
    operation = torch.library.custom_op(f"{_NAMESPACE}::{function.__name__}", function, mutates_args=())
    operation.register_fake(lambda *args: torch.empty_like(args[0]))
    return operation
