"""What a graph writes to: its inputs and constants, also through a view."""

from torch import fx

__all__ = ["indices_of_written", "written_inputs"]


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


def indices_of_written(graph: fx.Graph) -> list[int]:
    """Which of its inputs a graph writes to, by their numbers."""
    inputs, written = [node for node in graph.nodes if node.op == "placeholder"], written_inputs(graph)
    return [index for index, node in enumerate(inputs) if node in written]


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.returns or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    return schema.returns[0].alias_info is not None
