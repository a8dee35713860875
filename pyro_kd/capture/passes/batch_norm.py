"""A pass that rewrites the sums of batch norm on a CPU in two stages: over the pixels of each row, then over the rows.

Inductor splits such a sum by channels, so each thread reads from all of memory. In two stages, each thread has its own rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["split_sums"]

aten = torch.ops.aten
_LEAST_PIXELS = 64


def split_sums(module: fx.GraphModule) -> None:
    """Rewrite the means and variances of batch norm, and the sums in its gradient, in place."""
    graph = module.graph
    tracer = fx.proxy.GraphAppendingTracer(graph)

    def proxy(node: fx.Node) -> Any:
        return fx.Proxy(node, tracer)

    for node in list(graph.nodes):
        rewrite = _REWRITES.get(node.target)
        if rewrite is None or not _is_large(node.args[0].meta["val"]):
            continue
        with graph.inserting_before(node):
            args: Any = fx.node.map_arg(node.args, proxy)
            results = rewrite(node.args[0].meta["val"].shape, *args, **node.kwargs)
        if results is None:
            continue
        for item in list(node.users):  # operator.getitem(node, number)
            result = results[item.args[1]].node
            result.meta |= {key: value for key, value in item.meta.items() if key == "val"}
            item.replace_all_uses_with(result)
            graph.erase_node(item)
        graph.erase_node(node)
    module.recompile()


def _is_large(value: Tensor) -> bool:
    return (
        value.device.type == "cpu"
        and value.dtype in (torch.float32, torch.float64)
        and value.shape[2:].numel() >= _LEAST_PIXELS
    )


def _var_mean(
    shape: torch.Size, x: Any, dims: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Sequence[Any] | None:
    pixels = list(range(2, len(shape)))
    if dims is None or list(dims) != [0, *pixels] or correction != 0:
        return None
    variances, means = torch.var_mean(x, pixels, correction=0, keepdim=True)
    mean = means.mean(0, keepdim=True)
    variance = variances.mean(0, keepdim=True) + (means - mean).square().mean(0, keepdim=True)
    return (variance, mean) if keepdim else (variance.flatten(), mean.flatten())


def _backward(
    shape: torch.Size,
    grad: Any,
    x: Any,
    weight: Any,
    running_mean: Any,
    running_var: Any,
    mean: Any,
    inverse_std: Any,
    is_training: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> Sequence[Any] | None:
    """The gradient with respect to x, weight and bias: Ioffe and Szegedy, Batch Normalization, 2015, Section 3."""
    if not is_training:
        return None
    pixels, ones = list(range(2, len(shape))), [1] * (len(shape) - 2)
    count = shape.numel() / shape[1]
    centred = x - mean.view(1, -1, *ones)
    grad_bias = grad.sum(pixels).sum(0)
    grad_weight = (grad * centred).sum(pixels).sum(0) * inverse_std
    # The gradient without its mean and its part along the normalised x. The sum begins with x, so that the result has x's strides.
    slope = (grad_weight * inverse_std / count).view(1, -1, *ones)
    scale = inverse_std if weight is None else inverse_std * weight
    grad_x = (centred * -slope + grad - (grad_bias / count).view(1, -1, *ones)) * scale.view(1, -1, *ones)
    return grad_x, grad_weight, grad_bias


_REWRITES: Mapping[Any, Callable[..., Sequence[Any] | None]] = {
    aten.var_mean.correction: _var_mean,
    aten.native_batch_norm_backward.default: _backward,
}
