"""Passes that determine what a graph takes as inputs, and what it holds as constants."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, fx

from pyro_kd.capture.passes.writes import written_inputs
from pyro_kd.capture.sizes import deciding_inputs
from pyro_kd.capture.state import Place

__all__ = ["make_constant", "take_reads", "tidy"]


def take_reads(
    module: fx.GraphModule, lines: Sequence[str], places: Sequence[Place | None], leaves: Collection[int]
) -> list[Place]:
    """Remove the last outputs, which are the tensors that determine shapes and numbers.

    Args:
        module: the graph.
        lines: for each of these outputs, the line that reads it.
        places: where the inputs live; None for an argument.
        leaves: ids of the tensors that are trained.

    Returns:
        Where the tensors live that these outputs are computed from.

    Raises:
        DataDependentError: an output is computed from a tensor that changes from call to call.
    """
    if not lines:
        return []
    output: Any = module.graph.output_node()
    outputs = list(output.args[0])
    output.args = (outputs[: -len(lines)],)
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    place_of = dict(zip(nodes, places, strict=True))
    written = written_inputs(module.graph)

    def may_change(node: fx.Node) -> bool:
        place = place_of.get(node)
        is_argument = node.op == "placeholder" and place is None
        return is_argument or node in written or (place is not None and id(place.tensor()) in leaves)

    sources = deciding_inputs(list(zip(outputs[-len(lines) :], lines, strict=True)), may_change)
    module.recompile()
    return [place_of.get(node) or Place.of(getattr(module, str(node.target))) for node in sources]


def make_constant(module: fx.GraphModule, places: Sequence[Place], frozen: set[int]) -> list[Place]:
    """Turn frozen inputs into constants, unless one of them is written to.

    Args:
        module: the graph.
        places: where its first inputs live.
        frozen: ids of frozen tensors.

    Returns:
        Where the constants live.
    """
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"][: len(places)]
    chosen = [(node, place) for node, place in zip(nodes, places, strict=True) if id(place.tensor()) in frozen]
    if not written_inputs(module.graph).isdisjoint(node for node, _ in chosen):
        return []
    for number, (node, place) in enumerate(chosen):
        module.register_buffer(f"frozen_{number}", place.tensor().detach())
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(f"frozen_{number}")
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
        module.graph.erase_node(node)
    module.recompile()
    return [place for _, place in chosen]


def tidy(module: fx.GraphModule, num_places: int, needed: Collection[int]) -> tuple[list[int], list[Tensor]]:
    """Drop inputs that are not used, and turn constants that the trace has found into inputs.

    Args:
        module: the graph.
        num_places: how many of its first inputs have a place; the rest are arguments, and are kept.
        needed: indices of inputs that are kept in any case.

    Returns:
        The indices of the places that are kept, and the tensors of the new inputs, which follow them.
    """
    graph = module.graph
    graph.eliminate_dead_code()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    kept = []
    for number, node in enumerate(inputs[:num_places]):
        if node.users or number in needed:
            kept.append(number)
        else:
            graph.erase_node(node)
    arguments, held = inputs[num_places:], dict[str, tuple[Tensor, fx.Node]]()
    first = next(iter(arguments), None) or next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if node.op == "get_attr":
            target = str(node.target)
            if target not in held:
                with graph.inserting_before(first):
                    held[target] = getattr(module, target), graph.placeholder(target)
                    held[target][1].meta = dict(node.meta)
            node.replace_all_uses_with(held[target][1])
            graph.erase_node(node)
    module.recompile()
    return kept, [tensor for tensor, _ in held.values()]
