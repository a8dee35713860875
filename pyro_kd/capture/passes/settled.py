"""A pass that drops the conditions of guards that hold for all inputs, such as an equality of two constants."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from pyro_kd.capture.passes.writes import writers_of_memory

__all__ = ["drop_settled"]

aten = torch.ops.aten
_MOST = 30
"""Computations with more operations are not searched."""


def drop_settled(module: fx.GraphModule, number: int) -> bool:
    """Drop settled conditions in place.

    Args:
        module: the graph. One of its outputs is whether all conditions hold.
        number: the index of that output.

    Returns:
        Whether any conditions are left. If not, the output is dropped too.
    """
    graph = module.graph
    output: Any = graph.output_node()
    holds = output.args[0][number]
    stack = holds.args[0]
    assert (holds.target, stack.target) == (aten.all.default, aten.stack.default)
    writers = writers_of_memory(graph)
    left = [condition for condition in stack.args[0] if not _is_settled(condition, writers)]
    if left:
        stack.args = (left, *stack.args[1:])
    else:
        outputs = list(output.args[0])
        del outputs[number]
        output.args = (outputs,)
        device = holds.meta["val"].device
        with graph.inserting_before(holds):
            true = graph.call_function(aten.full.default, ([], True), {"dtype": torch.bool, "device": device})
        holds.replace_all_uses_with(true)
    module.recompile()
    return bool(left)


def _is_settled(node: fx.Node, writers: Mapping[int, Sequence[fx.Node]]) -> bool:
    """Whether a node depends on constants only, to which no different operation writes."""
    todo, seen = [node], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node not in seen:
            tags = getattr(node.target, "tags", ())
            if node.op != "call_function" or torch.Tag.nondeterministic_seeded in tags or len(seen) > _MOST:
                return False
            seen.add(node)
            todo += node.all_input_nodes
    return all(writer in seen for node in seen for writer in writers.get(node.meta.get("memory", -1), ()))
