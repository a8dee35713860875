"""The leaf tensors that a tensor depends on differentiably."""

from collections.abc import Iterable

from torch import Tensor

__all__ = ["leaves_of"]


def leaves_of(tensors: Iterable[Tensor]) -> set[Tensor]:
    """The leaf tensors that the given tensors, of any shape, are or depend on differentiably."""
    tensors = list(tensors)
    leaves = {tensor for tensor in tensors if tensor.grad_fn is None and tensor.requires_grad}
    nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    return leaves
