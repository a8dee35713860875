"""Batch norm in graphs: a trace keeps it whole, and two passes prepare it for inductor.

    trace --DECLARED--> one operation each, as fast as without a graph
          --expand--> means, variances and products
          --split_sums--> sums in two stages

The whole operation declares its writes to the running averages. Inductor splits a sum over rows and pixels by channels, so each
thread reads from all of memory. In two stages, over the pixels of each row and then over the rows, each thread has its own rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_kd.utils.torch_internals import FakeTensorMode, get_decompositions

__all__ = ["DECLARED", "expand", "split_sums"]

aten = torch.ops.aten
_LEAST_PIXELS = 64


def _declared(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    is_training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """``native_batch_norm`` in a form whose schema says what it writes to."""
    if running_mean is None:
        return aten._native_batch_norm_legit.no_stats(x, weight, bias, is_training, momentum, eps)
    if not is_training:
        return aten._native_batch_norm_legit_no_training.default(x, weight, bias, running_mean, running_var, momentum, eps)
    return aten._native_batch_norm_legit.default(x, weight, bias, running_mean, running_var, is_training, momentum, eps)


DECLARED: Any = get_decompositions([aten.cudnn_batch_norm, aten.miopen_batch_norm]) | {
    aten.native_batch_norm.default: _declared
}
"""The decompositions of a trace."""

_WHOLE: Any = get_decompositions([aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training])


def expand(module: fx.GraphModule) -> None:
    """Rewrite each batch norm as the operations that it consists of, in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target not in _WHOLE:
            continue
        given = [argument for argument in node.args if isinstance(argument, fx.Node)]
        with graph.inserting_before(node):
            inner = _parts(node, given)
            places = (inner_node for inner_node in inner.nodes if inner_node.op == "placeholder")
            results: Any = graph.graph_copy(inner, dict(zip(places, given, strict=True)))
        for item in list(node.users):  # operator.getitem(node, number)
            item.replace_all_uses_with(results[item.args[1]])
            graph.erase_node(item)
        graph.erase_node(node)
    module.recompile()


def _parts(node: fx.Node, given: Sequence[fx.Node]) -> fx.Graph:
    """A graph with the operations of one batch norm: a function of its tensors, of any shapes."""

    def run(*tensors: Tensor) -> Any:
        remaining = iter(tensors)
        args = [next(remaining) if isinstance(argument, fx.Node) else argument for argument in node.args]
        return _WHOLE[node.target](*args)

    values = [argument.meta["val"] for argument in given]
    with FakeTensorMode():
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in values]
        return make_fx(run, decomposition_table=_WHOLE)(*inputs).graph


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
