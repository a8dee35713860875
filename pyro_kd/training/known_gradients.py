"""ELBOs that return a number and put gradients into place themselves (``TraceGraph_ELBO``, ``RenyiELBO``), as differentiable tensors.

The training loop differentiates tensors. This makes one out of a call of ``loss_and_grads``: its value is the number, and its
gradient is the one that the call has put into place. It knows tensors and the two methods of Pyro's ELBO, and no objectives.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

__all__ = ["loss_with_gradients"]


def loss_with_gradients(
    elbo: Any,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    trained: Collection[Tensor],
) -> Tensor:
    """The loss of an ELBO, with gradients for what is trained.

    Args:
        elbo: an object with ``loss_and_grads(model, guide, *args, **kwargs)``.
        model, guide: its programs.
        args, kwargs: their arguments.
        trained: the leaf tensors whose gradients are wanted; what their ``grad`` holds stays as it is.

    Returns:
        A float64 scalar tensor. It requires no gradient where the ELBO has put none into place.
    """
    before = [tensor.grad for tensor in trained]
    for tensor in trained:
        tensor.grad = None
    try:
        number = float(elbo.loss_and_grads(model, guide, *args, **kwargs))
        gradients = {tensor: tensor.grad for tensor in trained if tensor.grad is not None}
    finally:
        for tensor, gradient in zip(trained, before, strict=True):
            tensor.grad = gradient
    value = torch.tensor(number, dtype=torch.float64)
    if not gradients:
        return value
    apply: Callable[..., Tensor] = _KnownGradients.apply
    return apply(value, list(gradients.values()), *gradients)


class _KnownGradients(torch.autograd.Function):
    """The identity in its first argument, whose gradients for the other tensors are given."""

    @staticmethod
    def forward(context: Any, value: Tensor, gradients: list[Tensor], *trained: Tensor) -> Tensor:
        context.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(context: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # with create_graph=True
            raise RuntimeError(
                "an ELBO that puts gradients into place itself can only be differentiated once: use another one"
            )
        number = factor.item()
        return None, None, *(number * gradient for gradient in context.gradients)
