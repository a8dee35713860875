"""The terms of the sites: what a loss is the weighted sum of."""

from typing import NamedTuple

from torch import Tensor

from pyro_kd.utils.tables import figure, format_table, html_table

__all__ = ["SiteTerm", "SiteTerms"]

_HEADER = ["site", "kind", "divergence", "computed", "term", "weight", "in the loss"]


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

    def _cells(self) -> list[str]:
        how = {True: "closed form", False: "Monte Carlo", None: "-"}[self.analytic]
        value = float(self.value.detach())
        return [self.name, self.kind, self.divergence, how, figure(value), figure(self.weight), figure(self.weight * value)]

    def _repr_html_(self) -> str:
        return html_table(_HEADER, [self._cells()])


class SiteTerms(dict[str, SiteTerm]):
    """The terms of a loss by site, in the teacher's execution order; shown as a table."""

    def _rows(self) -> list[list[str]]:
        total = sum(term.weight * float(term.value.detach()) for term in self.values())
        return [*[term._cells() for term in self.values()], ["loss", *[""] * 5, figure(total)]]

    def __repr__(self) -> str:
        return format_table(_HEADER, self._rows())

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows())
