"""What a long run that uses a few weights again and again allows: a recurrent network, unrolled over hundreds of steps.

Such a graph is too long for ``torch.compile``, whose time grows with every operation. Two changes take out most of its cost on a CPU,
and neither changes what is computed, but for rounding:

- The gradient of a weight is a sum over its uses of products of two thin matrices, each as large as the weight. All of them are one
  product of matrices that are as long as the sequence.
- A matrix that multiplies hundreds of others is brought into the order that the multiplication works in once, and not for each: a
  frozen teacher's once and for all.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["shorten", "written_inputs"]

aten = torch.ops.aten
_LEAST_USES = 8


def shorten(module: fx.GraphModule) -> None:
    """Make both changes in place."""
    _merge_gradients(module.graph)
    if torch.backends.mkl.is_available():
        _pack_weights(module)
    module.graph.eliminate_dead_code()
    module.recompile()


def _merge_gradients(graph: fx.Graph) -> None:
    """Sums of many ``g' x``, and of many sums of g over its rows, as one of all rows."""
    joined: dict[tuple[fx.Node, ...], fx.Node] = {}
    for root in list(graph.nodes):
        if not _is_sum(root) or (len(root.users) == 1 and _is_sum(next(iter(root.users)))):
            continue
        groups, rest = defaultdict[Any, list[tuple[fx.Node, tuple[fx.Node, ...]]]](list), list[fx.Node]()
        for term in _terms(root):
            kind, parts = _parts(term)
            groups[kind].append((term, parts))
        for kind in list(groups):
            if kind is None or len(groups[kind]) < _LEAST_USES:
                rest += [term for term, _ in groups.pop(kind)]
        if not groups:
            continue
        with graph.inserting_before(root):

            def rows_of(nodes: Sequence[fx.Node]) -> fx.Node:
                key = tuple(nodes)
                if key not in joined:
                    joined[key] = graph.call_function(aten.cat.default, (list(nodes),))
                return joined[key]

            for (name, is_transposed, *shape), uses in groups.items():
                g = rows_of([parts[0] for _, parts in uses])
                if name == "rows":
                    total = graph.call_function(aten.sum.dim_IntList, (g, [0]))
                    total = graph.call_function(aten.view.default, (total, shape[0]))
                else:
                    x = rows_of([parts[1] for _, parts in uses])
                    total = graph.call_function(aten.mm.default, (graph.call_function(aten.t.default, (g,)), x))
                    total = graph.call_function(aten.t.default, (total,)) if is_transposed else total
                rest.append(total)
            value = rest[0]
            for term in rest[1:]:
                value = graph.call_function(aten.add.Tensor, (value, term))
        value.meta["val"] = root.meta["val"]
        root.replace_all_uses_with(value)


def _is_sum(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args)


def _terms(root: fx.Node) -> list[fx.Node]:
    """The terms of a sum of sums."""
    terms, stack = [], [root]
    while stack:
        node = stack.pop()
        if node is root or (_is_sum(node) and len(node.users) == 1):
            stack.extend(node.args)  # type: ignore[arg-type]
        else:
            terms.append(node)
    return terms


def _parts(term: fx.Node) -> tuple[Any, tuple[fx.Node, ...]]:
    """What a term is made of, and its kind: ``(g' x)`` or its transpose, or the sum of g over its rows; None for all others."""
    base, is_transposed = _stripped(term)
    if base.target is aten.mm.default:
        g, is_turned = _stripped(base.args[0])
        x = base.args[1]
        if is_turned and isinstance(x, fx.Node) and "val" in g.meta and "val" in x.meta:
            return ("product", is_transposed, _value(g).shape[1], _value(x).shape[1], _value(g).dtype), (g, x)
    if term.target is aten.view.default and isinstance(term.args[0], fx.Node):
        inner = term.args[0]
        if inner.target is aten.sum.dim_IntList and inner.args[1] == [0] and not inner.kwargs:
            rows: Any = inner.args[0]
            shape: Any = term.args[1]
            if "val" in rows.meta and _value(rows).dim() == 2:
                return ("rows", False, tuple(shape), _value(rows).dtype), (rows,)
    return None, ()


def written_inputs(graph: fx.Graph) -> set[fx.Node]:
    """The inputs and constants that a graph writes to, also through a view."""
    found = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
                base = value
                while _is_view(base):
                    base = base.args[0]  # type: ignore[assignment]
                if base.op != "call_function":
                    found.add(base)
    return found


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.returns or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    return schema.returns[0].alias_info is not None


def _pack_weights(module: fx.GraphModule) -> None:
    """Matrices that multiply at least eight others in the order that MKL works in."""
    graph, written = module.graph, written_inputs(module.graph)
    uses = defaultdict[Any, list[fx.Node]](list)
    for node in graph.nodes:
        if node.target in (aten.mm.default, aten.addmm.default):
            x, matrix = node.args[-2:]
            weight, is_transposed = _stripped(matrix)
            if weight.op not in ("placeholder", "get_attr") or weight in written or node.kwargs:
                continue
            if len(node.args) == 3 and _value(node.args[0]).shape != _value(node).shape[1:]:
                continue  # a matrix is added, and no bias
            value = _value(weight)
            if value.device.type == "cpu" and value.dtype == torch.float32:
                uses[weight, is_transposed, _value(x).shape[0]].append(node)
    first = next(node for node in graph.nodes if node.op == "call_function")
    for (weight, is_transposed, rows), nodes in uses.items():
        if len(nodes) < _LEAST_USES or rows == 1:
            continue
        with graph.inserting_before(first):
            if weight.op == "get_attr":
                tensor = getattr(module, str(weight.target))
                tensor = tensor if is_transposed else tensor.t().contiguous()
                name = f"{weight.target}_{'t' if is_transposed else 'n'}{rows}"
                module.register_buffer(name, tensor)
                module.register_buffer(f"{name}_packed", torch.ops.mkl._mkl_reorder_linear_weight(tensor, rows))
                plain, packed = graph.get_attr(name), graph.get_attr(f"{name}_packed")
            else:
                plain = weight
                if not is_transposed:
                    turned = graph.call_function(aten.t.default, (weight,))
                    plain = graph.call_function(aten.clone.default, (turned,), {"memory_format": torch.contiguous_format})
                packed = graph.call_function(torch.ops.mkl._mkl_reorder_linear_weight.default, (plain, rows))
        for node in nodes:
            bias = node.args[0] if node.target is aten.addmm.default else None
            with graph.inserting_before(node):
                args = (node.args[-2], packed, plain, bias, rows)
                new = graph.call_function(torch.ops.mkl._mkl_linear.default, args)
            new.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(new)


def _stripped(node: Any) -> tuple[fx.Node, bool]:
    """What was transposed, and whether it is now."""
    is_transposed = False
    while node.target is aten.t.default:
        node, is_transposed = node.args[0], not is_transposed
    return node, is_transposed


def _value(node: Any) -> Tensor:
    value: Tensor = node.meta["val"]
    return value
