"""The parts in which a loss is evaluated: one for each particle where particles are averaged, otherwise a single one."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_kd.losses.terms import SiteTerm, SiteTerms, mean_terms
from pyro_kd.sites.tracing import params_of

__all__ = ["Share", "loss_of", "params_of_students", "terms_of_shares"]


class Share(NamedTuple):
    """A part of a loss.

    Attributes:
        loss: a scalar tensor.
        params: the student's parameters in Pyro's store that it may depend on, by name.
        terms: the terms of each particle, with their weights in this call.
    """

    loss: Tensor
    params: Callable[[], dict[str, Tensor]]
    terms: Callable[[], Sequence[Sequence[SiteTerm]]]


def loss_of(shares: Sequence[Share]) -> Tensor:
    """The loss that shares add up to, a scalar tensor."""
    losses = [share.loss for share in shares]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def terms_of_shares(shares: Sequence[Share]) -> SiteTerms:
    """The terms of all particles, averaged by site, with the loss, which is differentiable."""
    means = mean_terms([terms for share in shares for terms in share.terms()])
    means.loss = loss_of(shares)
    return means


def params_of_students(students: Iterable[Any]) -> dict[str, Tensor]:
    """The parameters that are in Pyro's store and that the runs of a student have used, by name."""
    return {name: param for trace in students for name, param in params_of(trace).items()}
