"""The terms of the sites, whose weighted sum is by default the loss.

PairedRun --> can each pair be compared? --> divergence --> scale, mask, plates --> one SiteTerm per site
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_kd.divergences import Divergence, DivergenceFunction, kl
from pyro_kd.errors import PyroKDError, UnsupportedDivergenceError
from pyro_kd.losses.latent_form import LatentForm, in_form
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.losses.site_divergence import SiteDivergence
from pyro_kd.losses.stacking import totals
from pyro_kd.losses.targets import Weight, weight_of
from pyro_kd.noise.point_masses import is_point
from pyro_kd.noise.samplers import draw_of, replayable, unwrapped
from pyro_kd.sites.compatibility import check_comparable, check_same_weighting
from pyro_kd.sites.pairing import SitePair
from pyro_kd.utils.tables import figure, format_table, html_table

__all__ = ["SiteTerm", "SiteTerms", "divergence_at", "given_part", "mean_terms", "parts_of", "terms_of"]

_HEADER = ["site", "kind", "divergence", "computed", "term", "weight", "in the loss"]


class SiteTerm(NamedTuple):
    """The term of one site in a distillation loss.

    Attributes:
        name: the teacher's name of the site. With teacher forcing by coins, a latent site has two terms: ``"z"`` of the elements that
            the student draws, and ``"z (given)"`` of those that it is given.
        kind: ``"target"``, ``"latent"`` or ``"given"``.
        value: the divergence, summed over plates with scale and mask and averaged over particles, before its weight: a scalar tensor.
            For :func:`~pyro_kd.divergences.kl` it is in nats.
        weight: the factor with which the value enters the loss. In a compiled graph it is a scalar tensor, so that a schedule of
            weights needs no new graph.
        divergence: name of the divergence function.
        analytic: whether the value is in closed form; None where this is unknown.
    """

    name: str
    kind: str
    value: Tensor
    weight: float | Tensor
    divergence: str
    analytic: bool | None

    @property
    def site(self) -> str:
        """The name of the site, without what :func:`given_part` adds."""
        return self.name.removesuffix(given_part("")) if self.kind == "given" else self.name

    @property
    def weighted(self) -> Tensor:
        """The value times the weight, a scalar tensor; 0 where the weight is 0, also of a value that is infinite."""
        if type(self.weight) is float and self.weight == 0:
            return torch.zeros_like(self.value)
        return self.value if type(self.weight) is float and self.weight == 1 else self.weight * self.value

    def _cells(self) -> list[str]:
        how = {True: "closed form", False: "Monte Carlo", None: "-"}[self.analytic]
        value, weight = float(self.value.detach()), float(self.weight)
        weighted = weight * value if weight else 0.0
        return [self.name, self.kind, self.divergence, how, figure(value), figure(weight), figure(weighted)]

    def _repr_html_(self) -> str:
        return html_table(_HEADER, [self._cells()])


class SiteTerms(dict[str, SiteTerm]):
    """The terms of a loss by site, in the teacher's execution order; shown as a table.

    Attributes:
        loss: the loss, a scalar tensor.
        is_weighted_sum: whether it is the sum of ``weight * value`` over the terms: not where a loss overrides ``combine``.
    """

    loss: Tensor
    is_weighted_sum: bool = True

    def _rows(self) -> list[list[str]]:
        rows = [term._cells() for term in self.values()]
        if not self.is_weighted_sum:
            rows = [[*cells[:-1], "-"] for cells in rows]
        return [*rows, ["loss", *[""] * 5, figure(float(self.loss.detach()))]]

    def __repr__(self) -> str:
        return format_table(_HEADER, self._rows())

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows())


def mean_terms(runs: Sequence[Sequence[SiteTerm]]) -> SiteTerms:
    """The terms of several runs, averaged by site; a run that lacks a site counts as 0. The caller sets ``loss``."""
    means = SiteTerms()
    for term in (term for terms in runs for term in terms):
        value = term.value / len(runs) if len(runs) > 1 else term.value
        means[term.name] = term._replace(value=means[term.name].value + value if term.name in means else value)
    return means


def terms_of(
    run: PairedRun,
    *,
    divergence: DivergenceFunction = kl,
    latent_divergence: DivergenceFunction = kl,
    latent_weight: Weight = 1.0,
    given_weight: Weight | None = None,
    latent_form: LatentForm = "conditional",
    latent_reduction: str = "sum",
    num_vectorized: int = 1,
    report: bool = False,
    comparable: set[tuple[Any, ...]] | None = None,
) -> list[SiteTerm]:
    """Compare the distributions of a run, site by site.

    Args:
        run: a run of both programs.
        divergence: ``d(p, q, value)`` at target sites, which returns a tensor of shape ``batch_shape``.
        latent_divergence: likewise at latent sites.
        latent_weight: weight of the latents: a number, a mapping by site name, or a function of the site name.
        given_weight: weight of the latents, or elements of them, that the student was given: likewise. None: ``latent_weight``.
        latent_form: whether the distributions of latents are compared, or their values; see :mod:`pyro_kd.losses.latent_form`.
        latent_reduction: ``"sum"`` over the dimensions of a latent's event, or ``"mean"``.
        num_vectorized: number of particles in an outer plate of the run; each term is their mean.
        report: whether to add the terms of weight 0 that can be computed.
        comparable: signatures of the pairs that were found comparable in earlier runs; new ones are added.

    Returns:
        The terms, in the teacher's execution order. Terms of weight 0 are left out unless ``report`` is set.

    Raises:
        PlateMismatchError, ShapeMismatchError, SupportMismatchError, UnsupportedDivergenceError: a pair cannot be compared.
    """
    comparable = set() if comparable is None else comparable

    def wanted(pair: SitePair) -> SiteDivergence:
        is_given = given_weight is not None and run.given.get(pair.name) is True
        if not pair.is_target and not is_given:  # given values are equal, so that only their distributions can be compared
            pair = in_form(pair, latent_form, latent_divergence)
        item = divergence_at(pair, divergence, latent_divergence, latent_reduction, num_vectorized)
        check_same_weighting(pair)
        key = (pair.signature, num_vectorized > 1)
        if key not in comparable:
            check_comparable(pair, needs_support=item.divergence.needs_support, is_vectorized=num_vectorized > 1)
            comparable.add(key)
        if pair.is_data and (is_point(pair.p) or item.divergence.is_exact(pair.p, pair.q) is not True):
            item = item._replace(pair=_with_a_draw(pair))
        given = None if pair.is_target else run.given.get(pair.name)
        return item._replace(given=given) if isinstance(given, Tensor) else item

    parts = {pair.name: list(parts_of(pair, run, latent_weight, given_weight)) for pair in run.pairs}
    counts = {name: any(part.weight != 0 for part in parts[name]) for name in parts}
    with run.evaluating():
        items = [wanted(pair) for pair in run.pairs if counts[pair.name]]
        found = {item.pair.name: (item, values) for item, values in zip(items, totals(items), strict=True)}
        for pair in run.pairs if report else ():
            if not counts[pair.name]:
                with suppress(PyroKDError):
                    item = wanted(pair)
                    found[pair.name] = item, totals([item])[0]
    terms = list[SiteTerm]()
    for item, values in (found[pair.name] for pair in run.pairs if pair.name in found):
        pair, divergence = item.pair, item.divergence
        analytic = divergence.is_exact(pair.p, pair.q) if report else None
        for part, value in zip(parts[pair.name], values, strict=True):
            if report or part.weight != 0:
                terms.append(SiteTerm(part.name, part.kind, value, part.weight, divergence.name, analytic))
    return terms


def divergence_at(
    pair: SitePair,
    divergence: DivergenceFunction,
    latent_divergence: DivergenceFunction,
    latent_reduction: str,
    num_vectorized: int,
) -> SiteDivergence:
    """The divergence that a loss with these options takes at a pair of sites; see :func:`terms_of`."""
    chosen = Divergence.of(divergence if pair.is_target else latent_divergence).at(pair.p, pair.q)
    is_mean = latent_reduction == "mean" and not pair.is_target
    size = max(math.prod(getattr(pair.p, "event_shape", ())), 1) if is_mean else 1  # a tuple in Pyro's HMMs
    return SiteDivergence(pair, chosen, num_vectorized * size)


def _with_a_draw(pair: SitePair) -> SitePair:
    """A pair whose value is a draw of the teacher's distribution, which an estimate needs, in place of data."""
    try:
        with torch.no_grad():
            return pair._replace(value=draw_of(replayable(pair.p)))
    except NotImplementedError as error:
        family = type(unwrapped(pair.p)).__name__
        raise UnsupportedDivergenceError(
            f"site {pair.name!r}: with target_values='data', the divergence is estimated at a draw of the teacher's {family}, which "
            f"cannot be sampled. Use a divergence in closed form, or register a sampler with @pyro_kd.register_sampler({family})."
        ) from error


class Part(NamedTuple):
    """A term that a site will have, see :class:`SiteTerm`."""

    name: str
    kind: str
    weight: float


def parts_of(pair: SitePair, run: PairedRun, latent_weight: Weight, given_weight: Weight | None) -> Iterator[Part]:
    """The terms of a site. Where the student was given some of the elements, those that it drew come first."""
    if pair.is_target:
        yield Part(pair.name, "target", 1.0)
        return
    given = run.given.get(pair.name, False) if given_weight is not None else False
    if given is not True:
        yield Part(pair.name, "latent", weight_of(pair.name, latent_weight))
    if given is not False and given_weight is not None:
        weight = weight_of(pair.name, given_weight, option="given_weight")
        yield Part(pair.name if given is True else given_part(pair.name), "given", weight)


def given_part(name: str) -> str:
    """The name of the term of the elements of a latent site that the student was given."""
    return f"{name} (given)"
