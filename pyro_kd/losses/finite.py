"""Checks that terms and gradients are finite, so that no update is made with a NaN."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pyro_kd.errors import NonFiniteLossError
from pyro_kd.losses.terms import SiteTerm

__all__ = ["check_finite_gradients", "check_finite_loss", "check_finite_terms"]


def check_finite_terms(terms: Iterable[SiteTerm]) -> None:
    """Raise NonFiniteLossError naming the first site, in execution order, whose term is NaN or infinite."""
    total = 0.0
    for term in terms:
        value = float(term.value.detach())
        total += float(term.weight) * value
        if not math.isfinite(value):
            shown = "NaN" if math.isnan(value) else "infinite"
            raise NonFiniteLossError(
                f"the {term.divergence} term of {term.kind} site {term.name!r} is {shown}; no update was made. Usual causes: a draw "
                "of the teacher outside the student's support, a scale or probability of 0, a learning rate that is too high. "
                "loss.terms(student, teacher, ...) shows the terms. latent_weight={...: 0} leaves a latent out. If the support of a "
                "target depends on discrete latents, make these latents targets too."
            )
    if not math.isfinite(total):
        raise NonFiniteLossError(f"the loss is {total}, although the term of each site is finite: check latent_weight.")


def check_finite_loss(loss: Tensor, terms: Iterable[SiteTerm]) -> None:
    """Raise NonFiniteLossError where a loss, a scalar tensor, is NaN or infinite. It names the first site whose term is.

    Args:
        loss: the loss.
        terms: of all particles; looked at only if the loss is not finite.
    """
    value = loss.item()
    if not math.isfinite(value):
        check_finite_terms(terms)
        raise NonFiniteLossError(
            f"the loss is {value}, although the term of each site is finite: check combine() or latent_weight."
        )


def check_finite_gradients(params: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteLossError naming the first parameter whose gradient is NaN or infinite."""
    grads = [param.grad for param in params.values() if param.grad is not None]
    if not grads or torch.isfinite(torch.nn.utils.get_total_norm(grads)):
        return
    bad = [name for name, param in params.items() if param.grad is not None and not param.grad.isfinite().all()]
    if bad:
        raise NonFiniteLossError(
            f"the loss is finite, but its gradient with respect to parameter {bad[0]!r} is not; no update was made. Usual causes: "
            "a square root, norm or logarithm of 0 in the student, or an overflow in its network."
        )
