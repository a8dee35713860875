r"""The bound of a row from the densities of its targets under K samples of the noise, with the gradient that is asked for.

log p, log q, scores, each of shape (K, rows) --> the bound of each row

The value is always that of the K-sample bound. The gradients differ in how they reach discrete latents. Knows tensors only.
"""

import math

import torch
from torch import Tensor

__all__ = ["GRADIENTS", "mixture_bound", "without_value"]

GRADIENTS = ("score", "leave_one_out", "cut")


def mixture_bound(
    log_p: Tensor, log_q: Tensor, scores: Tensor | None, gradient: str, *, is_first_coupled: bool = True
) -> Tensor:
    r"""The K-sample bound of each row.

    .. math:: \log \tfrac1K \sum_k p_\phi(y | \epsilon_k) - \log \tfrac1K \sum_k p_\theta(y | \epsilon_k)

    Args:
        log_p: the teacher's log densities of a row's targets, of shape ``(K, *rows)``. The targets were drawn under sample 1.
        log_q: the student's, of the same shape. Its derivative reaches what the densities depend on differentiably.
        scores: the student's log probability of its discrete latents, of the same shape; None if it has none.
        gradient: how the gradient reaches discrete latents, one of :data:`GRADIENTS`.
        is_first_coupled: whether the student's sample 1 depends on the targets, by the noise that it shares with them.

    Returns:
        Tensor of shape ``rows``.
    """
    bound = log_p.logsumexp(0) - log_q.logsumexp(0)
    if scores is None or gradient == "cut":
        return bound
    if gradient == "score":
        weights = log_q.detach().softmax(0) - 1 / len(log_q)
        return bound - without_value((weights * scores).sum(0))
    if is_first_coupled:  # its law given the targets is not the student's
        log_q, scores = log_q[1:], scores[1:]
    signal = _gain(log_q.detach())
    trained = -log_q.logsumexp(0) - (signal * scores).sum(0)
    return bound.detach() + without_value(trained)


def _gain(log_q: Tensor) -> Tensor:
    """What each sample adds to the log of the mean: that of all, less that of all others; of the shape of ``log_q``."""
    nothing = torch.full_like(log_q[:1], -math.inf)
    before = torch.cat([nothing, log_q[:-1].logcumsumexp(0)])
    after = torch.cat([log_q[1:].flip(0).logcumsumexp(0).flip(0), nothing])
    others = torch.logaddexp(before, after)  # without a difference, which would cancel where one sample outweighs all
    return log_q.logsumexp(0) - others - math.log(len(log_q) / (len(log_q) - 1))


def without_value(tensor: Tensor) -> Tensor:
    """A tensor of zeros with the gradient of ``tensor``, of any shape."""
    return tensor - tensor.detach()
