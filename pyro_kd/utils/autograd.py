"""What autograd knows of a tensor: the leaves that it depends on, and a derivative that is given to it."""

from collections.abc import Iterable

from torch import Tensor

__all__ = ["leaves_of", "with_slope"]


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


def with_slope(value: Tensor, slope: Tensor, parameter: Tensor) -> Tensor:
    """A value with a given derivative with respect to a parameter.

    Args:
        value: the tensor; its own history is left out.
        slope: the derivative, which broadcasts with the value.
        parameter: a tensor with a history, which broadcasts with the value.
    """
    moved = (parameter - parameter.detach()).nan_to_num()  # 0, also where the parameter is infinite
    return value.detach() + slope.detach().to(value.dtype) * moved.to(value.dtype)
