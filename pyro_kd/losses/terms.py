"""The term of one site: what a loss is the weighted sum of."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["SiteTerm"]


class SiteTerm(NamedTuple):
    """The term of one site in a distillation loss.

    Attributes:
        name: the teacher's name of the site.
        kind: ``"target"`` or ``"latent"``.
        value: the divergence, summed over plates with scale and mask, averaged over particles, in nats for
            :func:`~pyro_kd.divergences.kl`; before its weight. A scalar tensor.
        weight: the factor with which it enters the loss.
        divergence: name of the divergence function.
        analytic: whether it was computed in closed form; None where the function does not say.
    """

    name: str
    kind: str
    value: Tensor
    weight: float
    divergence: str
    analytic: bool | None
