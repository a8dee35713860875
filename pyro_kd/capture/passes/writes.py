"""What a graph writes to: its inputs and constants, also through views of any kind, as the recorder has seen it."""

from collections import defaultdict

from torch import fx

__all__ = ["indices_of_written", "writers_of_memory", "written_inputs"]


def writers_of_memory(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """The nodes that write, by the number of the memory that they write to; see :mod:`pyro_kd.capture.recorder`."""
    found = defaultdict[int, list[fx.Node]](list)
    for node in graph.nodes:
        for memory in node.meta.get("writes", ()):
            found[memory].append(node)
    return found


def written_inputs(graph: fx.Graph) -> set[fx.Node]:
    """The inputs and constants that a graph writes to."""
    writers = writers_of_memory(graph)
    return {node for node in graph.nodes if node.op in ("placeholder", "get_attr") and node.meta.get("memory") in writers}


def indices_of_written(graph: fx.Graph) -> list[int]:
    """Which of its inputs a graph writes to, by their numbers."""
    inputs, written = [node for node in graph.nodes if node.op == "placeholder"], written_inputs(graph)
    return [index for index, node in enumerate(inputs) if node in written]
