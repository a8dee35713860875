"""A pass for graphs that use a few weights many times, such as a recurrent network unrolled over hundreds of steps.

Such a graph is too long for ``torch.compile``, whose time grows with the number of operations. Two changes remove most of its cost on
a CPU. The result is the same up to rounding:

- The gradient of a weight is a sum over its uses. Each summand is a product of two thin matrices, and is as large as the weight. The
  summands of many uses become a single product of long matrices.
- A matrix that multiplies hundreds of others is brought into the memory order of the multiplication only once per call; that of a
  frozen teacher only once.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_kd.capture.passes.writes import written_inputs
from pyro_kd.utils.torch_internals import mkl_linear, pack_for_mkl

__all__ = ["shorten"]

aten = torch.ops.aten
_Parts = tuple[fx.Node, ...]
_LEAST_USES = 8
_LEAST_PACKED = 2**19  # elements
_ROWS = 512  # rows of a product of gradients; longer products are not faster


def shorten(module: fx.GraphModule) -> None:
    """Make both changes in place."""
    _merge_gradients(module.graph)
    _order_weights(module)
    module.graph.eliminate_dead_code()
    module.recompile()


def _merge_gradients(graph: fx.Graph) -> None:
    """Replace sums of many ``g' x``, or of many sums of g over its rows, by sums of a few terms with many rows each.

    A single term would need all rows in memory at once. Each of the few terms is computed as soon as its rows exist.
    """
    order = list(graph.nodes)
    positions = {node: position for position, node in enumerate(order)}
    joined: dict[tuple[fx.Node, ...], fx.Node] = {}

    def join(nodes: Sequence[fx.Node], place: fx.Node) -> fx.Node:
        key = (*nodes, place)
        if key not in joined:
            joined[key] = graph.call_function(aten.cat.default, (list(nodes),))
        return joined[key]

    def merge(kind: str, uses: list[_Parts]) -> fx.Node:
        uses = sorted(uses, key=lambda parts: max(positions[part] for part in parts))
        count = -(-_ROWS // max(_value(uses[0][0]).shape[0], 1))
        total = None
        for start in range(0, len(uses), count):
            some = uses[start : start + count]
            place = order[max(positions[part] for part in some[-1]) + 1]
            with graph.inserting_before(place):
                g = join([parts[0] for parts in some], place)
                if kind == "rows":
                    rows = graph.call_function(aten.sum.dim_IntList, (g, [0]))
                    total = rows if total is None else graph.call_function(aten.add.Tensor, (total, rows))
                else:
                    g = graph.call_function(aten.t.default, (g,))
                    x = join([parts[1] for parts in some], place)
                    function, args = (aten.mm.default, (g, x)) if total is None else (aten.addmm.default, (total, g, x))
                    total = graph.call_function(function, args)
        assert total is not None
        return total

    for root in order:
        if not _is_sum(root) or (len(root.users) == 1 and _is_sum(next(iter(root.users)))):
            continue
        groups = defaultdict[Any, list[_Parts]](list)
        terms = [(term, *_parts(term)) for term in _terms(root)]
        for _, kind, parts in terms:
            groups[kind].append(parts)
        large = [kind for kind, uses in groups.items() if kind is not None and len(uses) >= _LEAST_USES]
        if not large:
            continue
        totals = {kind: merge(kind[0], groups[kind]) for kind in large}
        with graph.inserting_before(root):
            rest = [term for term, kind, _ in terms if kind not in large]
            for (name, is_transposed, *shape), total in totals.items():
                if name == "rows":
                    total = graph.call_function(aten.view.default, (total, shape[0]))
                elif is_transposed:
                    total = graph.call_function(aten.t.default, (total,))
                rest.append(total)
            value = rest[0]
            for term in rest[1:]:
                value = graph.call_function(aten.add.Tensor, (value, term))
        value.meta["val"] = root.meta["val"]
        positions[value] = positions[root]
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


def _parts(term: fx.Node) -> tuple[Any, _Parts]:
    """The form of a term, and its parts. Forms are ``g' x``, its transpose, and the sum of g over its rows; None for all others."""
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


def _order_weights(module: fx.GraphModule) -> None:
    """Bring matrices that multiply at least eight others on a CPU into the fastest memory order.

    For large constants this is MKL's own order, which needs about 8 MiB in addition to each matrix. For all others it is by columns.
    """
    graph, written = module.graph, written_inputs(module.graph)
    uses = defaultdict[Any, list[fx.Node]](list)
    for node in graph.nodes:
        if node.target in (aten.mm.default, aten.addmm.default):
            x, matrix = node.args[-2:]
            weight, is_transposed = _stripped(matrix)
            if weight.op not in ("placeholder", "get_attr") or weight in written or node.kwargs:
                continue
            if len(node.args) == 3 and _value(node.args[0]).shape != _value(node).shape[1:]:
                continue  # a matrix is added instead of a bias
            value = _value(weight)
            if value.device.type == "cpu" and value.dtype == torch.float32:
                uses[weight, is_transposed, _value(x).shape[0]].append(node)
    for (weight, is_transposed, rows), nodes in uses.items():
        if len(nodes) < _LEAST_USES:
            continue
        is_constant, is_large = weight.op == "get_attr", _value(weight).numel() >= _LEAST_PACKED
        if is_constant and is_large and rows > 1 and torch.backends.mkl.is_available():
            tensor = getattr(module, str(weight.target))
            name = f"{weight.target}_{'rows' if is_transposed else 'columns'}{rows}_packed"
            packed = pack_for_mkl(tensor if is_transposed else tensor.t(), rows)
            module.register_buffer(name, packed)
            with graph.inserting_before(nodes[0]):
                plain = weight if is_transposed else graph.call_function(aten.t.default, (weight,))
                constant = graph.get_attr(name)
            for node in nodes:
                bias = node.args[0] if node.target is aten.addmm.default else None
                args = (node.args[-2], constant, plain, bias, rows)
                _replace(node, mkl_linear(), args)
        elif is_transposed:
            with graph.inserting_before(nodes[0]):
                if is_constant:
                    name = f"{weight.target}_columns"
                    module.register_buffer(name, getattr(module, str(weight.target)).t().contiguous())
                    turned = graph.get_attr(name)
                else:
                    turned = graph.call_function(aten.t_copy.default, (weight,))
            for node in nodes:
                _replace(node, node.target, (*node.args[:-1], turned))


def _replace(node: fx.Node, function: Any, args: tuple[Any, ...]) -> None:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(function, args)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)


def _stripped(node: Any) -> tuple[fx.Node, bool]:
    """A node without its transpositions, and whether it is transposed by them."""
    is_transposed = False
    while node.target is aten.t.default:
        node, is_transposed = node.args[0], not is_transposed
    return node, is_transposed


def _value(node: Any) -> Tensor:
    value: Tensor = node.meta["val"]
    return value
