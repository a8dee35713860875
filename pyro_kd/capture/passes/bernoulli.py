"""A pass that rewrites Bernoulli draws for inductor: as uniform numbers below a probability.

Dropout draws its mask with ``bernoulli_``. Inductor's own form of it writes to a buffer that an earlier kernel may already have read,
and the loss is then NaN. A comparison does not write, and is computed in the kernel that uses it.
"""

from typing import Any

import torch
from torch import fx

__all__ = ["draw_uniformly"]

aten = torch.ops.aten


def draw_uniformly(module: fx.GraphModule) -> None:
    """Rewrite the Bernoulli draws of a graph in place. They keep their distribution, but use different random numbers."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target not in _DRAWS or node.kwargs.get("generator") is not None:
            continue
        tensor: Any = node.args[0]
        value = tensor.meta["val"]
        probability = node.args[1] if len(node.args) > 1 else (0.5 if node.target is aten.bernoulli_.float else tensor)
        is_double = value.dtype == torch.float64
        with graph.inserting_before(node):
            options = {"dtype": torch.float64 if is_double else torch.float32, "device": value.device}
            uniform = graph.call_function(aten.rand.default, (list(value.shape),), options)
            is_tensor = isinstance(probability, fx.Node)
            below = graph.call_function(aten.lt.Tensor if is_tensor else aten.lt.Scalar, (uniform, probability))
            result = graph.call_function(aten._to_copy.default, (below,), {"dtype": value.dtype})
            if node.target in _IN_PLACE:
                result = graph.call_function(aten.copy_.default, (tensor, result))
        result.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    module.recompile()


_IN_PLACE = {aten.bernoulli_.float, aten.bernoulli_.Tensor}
_DRAWS = _IN_PLACE | {aten.bernoulli.p, aten.bernoulli.Tensor, aten.bernoulli.default}
