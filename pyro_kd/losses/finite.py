"""Terms and gradients that are finite: a NaN is never trained on."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pyro_kd.errors import NonFiniteLossError
from pyro_kd.losses.terms import SiteTerm

__all__ = ["check_finite_gradients", "check_finite_terms"]


def check_finite_terms(terms: Iterable[SiteTerm]) -> None:
    """Raise NonFiniteLossError naming the first site, in execution order, whose term is NaN or infinite."""
    total = 0.0
    for term in terms:
        value = float(term.value.detach())
        total += float(term.weight) * value
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"the loss is {value} from {term.kind} site {term.name!r} on ({term.divergence}); nothing was "
                "trained on it. Usual causes: a teacher's draw outside the student's support, a scale or probability at 0, "
                "a learning rate that is too high. loss.terms(student, teacher, ...) shows the terms. "
                "For a latent, latent_weight={...: 0} leaves it out. For a target whose support depends on discrete latents, make "
                "these latents targets too."
            )
    if not math.isfinite(total):
        raise NonFiniteLossError(f"the loss is {total}, though each site's term is finite: check latent_weight.")


def check_finite_gradients(params: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteLossError naming the first parameter whose gradient is NaN or infinite."""
    grads = [param.grad for param in params.values() if param.grad is not None]
    if not grads or torch.isfinite(torch.nn.utils.get_total_norm(grads)):
        return
    bad = [name for name, param in params.items() if param.grad is not None and not param.grad.isfinite().all()]
    if bad:
        raise NonFiniteLossError(
            f"the loss is finite, but its gradient for parameter {bad[0]!r} is not; nothing was trained on it. Usual causes: "
            "a square root, norm or logarithm at 0 in the student, or an overflow in its network."
        )
