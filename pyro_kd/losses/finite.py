"""Checks that terms and gradients are finite, so that no update is made with a NaN."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pyro_kd.errors import NonFiniteLossError
from pyro_kd.losses.terms import SiteTerm
from pyro_kd.utils.advice import advice

__all__ = ["check_finite_gradients", "check_finite_loss", "check_finite_terms"]


def check_finite_terms(terms: Iterable[SiteTerm]) -> None:
    """Raise NonFiniteLossError naming the first site, in execution order, whose term is NaN or infinite.

    A term of weight 0 is only shown: it may be infinite.
    """
    total = 0.0
    for term in terms:
        if float(term.weight) == 0:
            continue
        value = float(term.value.detach())
        total += float(term.weight) * value
        if not math.isfinite(value):
            shown = "NaN" if math.isnan(value) else "infinite"
            raise NonFiniteLossError(
                f"the {term.divergence} term of {term.kind} site {term.name!r} is {shown}; no update was made. Usual causes: a draw "
                "of the teacher outside the student's support, a scale or probability of 0, a learning rate that is too high. "
                f"loss.terms(student, teacher, ...) shows the terms{_ways_out(term)}."
            )
    if not math.isfinite(total):
        raise NonFiniteLossError(f"the loss is {total}, although the term of each site is finite: check {_checked('')}.")


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
            f"the loss is {value}, although the term of each site is finite: check {_checked('combine()')}."
        )


def _ways_out(term: SiteTerm) -> str:
    """What may help at a site besides a repair of the programs."""
    if term.kind != "target":
        return advice().leaving_out(term.site)
    if advice().takes("latent_weight"):  # otherwise latents are summed out
        return ". If the support of a target depends on discrete latents, make these latents targets too"
    return ""


def _checked(own: str) -> str:
    weights = "the weights of the terms" if not advice().takes("latent_weight") else "latent_weight"
    return f"{own} or {weights}" if own else weights


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
