"""Layers whose sums are linear in their weights: their inputs and sums as rows of matrices, and their weights as one matrix."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

__all__ = ["LinearLayer", "linear_layers"]


class LinearLayer:
    """A linear layer, a convolution or the cell of an LSTM as ``sums = inputs @ weights``, with a last input of 1 for the bias.

    Args:
        module: the layer.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.kind = _kind_of(module)
        self.is_cell = isinstance(module, nn.LSTMCell)

    @property
    def unit_weight(self) -> str:
        """The name of a parameter whose first dimension is that of the units."""
        return "weight_hh" if self.is_cell else "weight"

    @property
    def num_units(self) -> int:
        """The number of sums; four for each unit of a cell."""
        return int(getattr(self.module, self.unit_weight).shape[0])

    def inputs(self, *args: Any, **kwargs: Any) -> Tensor:
        """The inputs of a call, of shape (rows, number of inputs): a row for each sum of a unit, such as a pixel."""
        rows = self._cell_inputs(*args, **kwargs) if self.is_cell else self._rows(*args, **kwargs)
        has_bias = self.module.bias if self.is_cell else self.module.bias is not None
        return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if has_bias else rows

    def sums(self, inputs: Callable[[], Tensor], output: Any) -> Tensor:
        """The sums of a call, of shape (rows, number of units), from its output, or from what makes its inputs in rows."""
        if self.is_cell:  # whose output is what comes of them
            rows = inputs()
            return rows @ self._weights().to(rows.dtype)
        units = output if isinstance(self.module, nn.Linear) else output.movedim(-1 - self._dims, -1)
        return units.reshape(-1, units.shape[-1])

    def add(self, change: Tensor) -> None:
        """Add to the weights, of shape (number of inputs, number of units)."""
        module = self.module
        parts = [module.weight_ih, module.weight_hh] if self.is_cell else [module.weight]
        start = 0
        for part in parts:
            size = part[0].numel()
            part.add_(change[start : start + size].mT.reshape(part.shape).to(part.dtype))
            start += size
        bias = module.bias_ih if self.is_cell else module.bias
        if start < len(change):
            bias.add_(change[start].to(bias.dtype))

    @property
    def _dims(self) -> int:
        """The number of dimensions that a convolution moves along."""
        return len(self.module.kernel_size)

    def _rows(self, input: Tensor) -> Tensor:
        if isinstance(self.module, nn.Linear):
            return input.reshape(-1, input.shape[-1])
        module, images = self.module, input.reshape(-1, *input.shape[-1 - self._dims :])
        sizes = [module.kernel_size, module.dilation, module.padding, module.stride]
        if self._dims == 1:  # an image of one line
            images, sizes = images.unsqueeze(-2), [(fill, size[0]) for fill, size in zip((1, 1, 0, 1), sizes, strict=True)]
        patches = unfold(images, *sizes)
        return patches.mT.reshape(-1, patches.shape[1])

    def _cell_inputs(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> Tensor:
        size = self.module.hidden_size
        hidden = input.new_zeros(*input.shape[:-1], size) if hx is None else hx[0]
        return torch.cat([input, hidden], -1).reshape(-1, input.shape[-1] + size)

    def _weights(self) -> Tensor:
        module = self.module
        parts = [module.weight_ih, module.weight_hh]
        if module.bias:
            parts.append((module.bias_ih + module.bias_hh).unsqueeze(1))
        return torch.cat(parts, 1).mT


def linear_layers(network: nn.Module) -> dict[str, LinearLayer]:
    """The layers of a network that are such, by name: without groups, with padding by zeros, and with real weights of their own."""
    return {name: LinearLayer(module) for name, module in network.named_modules() if _is_linear(module)}


def _kind_of(module: nn.Module) -> type | None:
    """The class of torch that a layer is of, and whose ``forward`` it has; ``PyroModule[nn.Linear]`` is one."""
    return next((kind for kind in _KINDS if isinstance(module, kind) and type(module).forward is kind.forward), None)


_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LSTMCell)


def _is_linear(module: nn.Module) -> bool:
    kind = _kind_of(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d) and (
        module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        return False
    weights = [module._parameters.get(name) for name in (("weight_ih", "weight_hh") if kind is nn.LSTMCell else ("weight",))]
    return kind is not None and all(weight is not None and weight.is_floating_point() for weight in weights)
