"""LSTMs that are trained on a CPU, in a form that a graph can have.

The operation of oneDNN keeps for its gradient what it has computed, but only where autograd is on, and a graph runs without autograd.
So while a run is traced, an LSTM that is differentiated consists of products and sigmoids, and differs by rounding.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pyro_kd.utils.torch_internals import pytree, without_mkldnn

__all__ = ["DecomposedLSTMs"]


class DecomposedLSTMs(TorchFunctionMode):
    """While active, LSTMs that are differentiated are taken apart. All other functions run unchanged."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.lstm and torch.is_grad_enabled() and _require_grad(args):
            with without_mkldnn():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _require_grad(args: Any) -> bool:
    return any(isinstance(each, torch.Tensor) and each.requires_grad for each in pytree.tree_leaves(args))
