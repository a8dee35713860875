"""The loss site by site, as a table: what is compared at a site, how noise is shared, and what the site contributes.

Input: a loss and two programs. Output: :class:`SiteReport`, whose ``str`` is the table and whose rows are plain numbers.
:mod:`pyro_kd.diagnosis.bounds` compares the loss as a whole with the exact KL.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_kd.diagnosis.paired_draws import single_particle
from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.evaluation import Evaluator
from pyro_kd.losses.finite import check_finite_terms
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.losses.program_pair import ProgramPair
from pyro_kd.losses.terms import SiteTerm, mean_terms, parts_of
from pyro_kd.metrics import Estimate
from pyro_kd.noise.between import BetweenDraw
from pyro_kd.noise.laws import Draw
from pyro_kd.noise.samplers import DIRECT, draws_nothing, replayable, sample_on, unwrapped
from pyro_kd.noise.tape import NoiseTape
from pyro_kd.sites.classification import compared_sites
from pyro_kd.sites.pairing import names_in_student
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.randomness import keeping_random_state, set_seed
from pyro_kd.utils.tables import figure, format_table, html_table, plus_minus
from pyro_kd.utils.tensors import tensors_in

__all__ = ["SiteReport", "SiteRow", "mechanism", "sharing_of", "site_report"]

Program = Callable[..., Any]

_HEADER = ["site", "kind", "batch | event", "noise", "divergence", "computed", "term", "weight", "gradient", "share"]


@dataclass(frozen=True)
class SiteRow:
    """One site of a :class:`SiteReport`.

    What does not apply is None: a fresh site has no term, and neither has a site of weight 0 that cannot be compared.

    Attributes:
        name: the teacher's name of the site; at a fresh site of the student, the student's.
        kind: ``"target"`` or ``"latent"``.
        batch_shape, event_shape: the shapes of the teacher's distribution; at a fresh site of the student, of the student's.
        noise: where the student's value comes from. ``"given"``: it is the teacher's value. ``"fresh"``: it is drawn from the
            student's own noise. ``"no noise"``: the site is a point mass. All others are functions of the teacher's noise:

            - ``"tape"``: by the family's own sampler;
            - ``"direct"``: likewise, without the cost of a tape;
            - ``"explicit map"``: by a map that pyro_kd has for the family;
            - ``"explicit map inside"``: by such a map for a distribution inside this one;
            - ``"converted"``: the noise is converted to a different distribution of noise;
            - ``"partly shared"``: the two programs need different amounts of noise, and share the leading entries.
        divergence: name of the divergence function.
        analytic: whether the term is in closed form, otherwise it is a Monte Carlo estimate; None where this is unknown.
        term: the term before its weight, mean over runs, per call, in the unit of the divergence (nats for kl).
        weight: the factor of the term in the loss.
        gradient_norm: Euclidean norm of the gradient of ``weight * term``, averaged over runs, with respect to the student's
            unconstrained parameters.
        share: ``weight * term`` as a share of the loss.
    """

    name: str
    kind: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    noise: str
    divergence: str | None = None
    analytic: bool | None = None
    term: Estimate | None = None
    weight: float | None = None
    gradient_norm: float | None = None
    share: float | None = None

    def _cells(self) -> list[str]:
        shape = " | ".join(" ".join(map(str, sizes)) for sizes in (self.batch_shape, self.event_shape)).strip()
        how = {True: "closed form", False: "Monte Carlo", None: "-"}[self.analytic]
        share = "-" if self.share is None else f"{100 * self.share:.1f} %"
        numbers = [plus_minus(self.term), figure(self.weight), figure(self.gradient_norm), share]
        return [self.name, self.kind, shape, self.noise, self.divergence or "-", how, *numbers]

    def __repr__(self) -> str:
        return format_table(_HEADER, [self._cells()])

    def _repr_html_(self) -> str:
        return html_table(_HEADER, [self._cells()])


@dataclass(frozen=True)
class SiteReport:
    """The table that :func:`site_report` returns; ``report["z"]`` is a row.

    Attributes:
        sites: one per site, in the teacher's execution order, fresh sites last.
        loss: the mean of the loss over runs; by default the sum of ``weight * term``.
        between: what the programs draw outside of their sample sites, in the first run.
    """

    sites: tuple[SiteRow, ...]
    loss: Estimate
    between: tuple[BetweenDraw, ...] = ()

    def __getitem__(self, name: str) -> SiteRow:
        for row in self.sites:
            if row.name == name:
                return row
        raise KeyError(f"there is no site {name!r}; the report has {[row.name for row in self.sites]}")

    @property
    def unit(self) -> str:
        """The unit of the terms: ``"nats"`` if all divergences are kl."""
        return "nats" if all(row.divergence in (None, "kl") for row in self.sites) else "units of the divergence"

    def __str__(self) -> str:
        return "\n".join([format_table(_HEADER, [row._cells() for row in self.sites]), *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEADER, [row._cells() for row in self.sites], self._notes())

    def _notes(self) -> list[str]:
        between = [f"drawn between sites: {draw}" for draw in self.between]
        total = f"loss {plus_minus(self.loss)} {self.unit} per call; ± standard error over {self.loss.num_samples} runs"
        return [*between, total]

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values, for ``json.dump``."""
        return asdict(self)


@keeping_random_state()
@torch.inference_mode(False)  # inference mode would leave no gradients to measure
def site_report(
    loss: DistillationLoss,
    student: Program,
    teacher: Program,
    *args: Any,
    num_samples: int = 20,
    seed: int | None = None,
    **kwargs: Any,
) -> SiteReport:
    """Measure the terms of a loss by site, over several runs of both programs.

    The programs run as in training: a student in train mode stays in it, and its modules are changed by the runs (batch norm updates
    its statistics). The ``grad`` of parameters does not change.

    Args:
        loss: the loss. If it is a mean over particles, each run has one particle.
        student, teacher: the programs.
        args, kwargs: arguments of both programs.
        num_samples: number of runs.
        seed: of the noise; None takes it from where the random streams stand. These are left as they were, so that two reports
            have the same noise unless they have different seeds.

    Returns:
        The report. Its ``str`` is an aligned table.

    Raises:
        TypeError: ``loss`` is not a distillation loss.
        PyroKDError: as for the loss.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd import SurrogateKD
        >>> from pyro_kd.diagnosis.reports import site_report
        >>> def program(loc):
        ...     def model():
        ...         with pyro.plate("rows", 100):
        ...             z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...             pyro.sample("x", dist.Normal(z, 0.5))
        ...     return model
        >>> pyro.set_rng_seed(0)
        >>> loc = torch.tensor(1.0, requires_grad=True)
        >>> print(site_report(SurrogateKD(["x"], latent_weight=0.1), program(loc), program(0.0)))
        site    kind  batch | event   noise  divergence     computed     term  weight  gradient   share
        -----------------------------------------------------------------------------------------------
        z     latent          100 |  direct          kl  closed form   50 ± 0     0.1        10   2.4 %
        x     target          100 |   given          kl  closed form  200 ± 0       1       400  97.6 %
        loss 205 ± 0 nats per call; ± standard error over 20 runs
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    set_seed(seed)
    single = loss if isinstance(loss, DistillationLoss) and loss.combines_particles else single_particle(loss)
    evaluator = Evaluator(single, ProgramPair(student, teacher))
    inputs = leaves_of(tensors_in((args, kwargs)))
    sites, columns, between = dict[str, SiteRow](), dict[str, _Column](), list[BetweenDraw]()
    losses = torch.zeros(num_samples).double()
    for index in range(num_samples):
        with poutine.block(), torch.enable_grad():
            particles = evaluator.particles(args, kwargs, report=True, keep_noise=True)
            losses[index] = float(evaluator.reported(particles, args, kwargs).detach())
        run, terms = particles[0].run, list(mean_terms([particle.terms for particle in particles]).values())
        check_finite_terms(terms)
        between = between or run.between
        for row in _sites_of(run, single):
            sites.setdefault(row.name, row)
        for term in terms:
            columns.setdefault(term.name, _Column(torch.zeros(num_samples).double())).add(index, term, inputs)
    total = float(losses.mean())
    shared = 0.0 if loss.combines_particles else total  # else the terms do not add up to the loss
    rows = [columns[name].fill(row, shared) if name in columns else row for name, row in sites.items()]
    rows.sort(key=lambda row: row.noise == "fresh")
    return SiteReport(tuple(rows), Estimate.of(losses), tuple(between))


@dataclass
class _Column:
    """What the runs have measured at one site. A run that lacks the site counts as 0."""

    values: Tensor
    divergence: str = ""
    analytic: bool | None = None
    weight: float = 0.0
    gradients: dict[Tensor, Tensor] = field(default_factory=dict)

    def add(self, index: int, term: SiteTerm, inputs: set[Tensor]) -> None:
        self.divergence, self.analytic, self.weight = term.divergence, term.analytic, float(term.weight)
        self.values[index] = float(term.value.detach())
        leaves = list(leaves_of([term.value]) - inputs)
        if leaves and term.weight != 0:
            gradients = torch.autograd.grad(term.value, leaves, retain_graph=True)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                self.gradients[leaf] = self.gradients[leaf] + gradient if leaf in self.gradients else gradient

    def fill(self, row: SiteRow, loss: float) -> SiteRow:
        gradients = list(self.gradients.values())
        norm = abs(self.weight) / len(self.values) * float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        return replace(
            row,
            divergence=self.divergence,
            analytic=self.analytic,
            term=Estimate.of(self.values),
            weight=self.weight,
            gradient_norm=norm,
            share=(self.weight * float(self.values.mean()) if self.weight else 0.0) / loss if loss else None,
        )


def _sites_of(run: PairedRun, loss: DistillationLoss) -> Iterator[SiteRow]:
    """The rows of a run: the pairs, then the fresh sites of the student and the teacher."""
    to_student = names_in_student(loss.site_map)
    for pair in run.pairs:
        site = run.student.nodes[to_student.get(pair.name, pair.name)]
        for part in parts_of(pair, run, loss.latent_weight, loss.given_weight):
            yield _row(part.name, part.kind, pair.p, sharing_of(part.kind, pair.name, run, site))
    named = {pair.name for pair in run.pairs}
    for trace in (run.student, run.teacher):
        for name, site in compared_sites(trace).items():
            if loss.fresh & {name, "*"} and name not in named:
                named.add(name)
                yield _row(name, "latent", site["fn"], "fresh")


def _row(name: str, kind: str, fn: Any, sharing: str) -> SiteRow:
    return SiteRow(name, kind, tuple(getattr(fn, "batch_shape", ())), tuple(getattr(fn, "event_shape", ())), sharing)


def sharing_of(kind: str, name: str, run: PairedRun, site: Any) -> str:
    """How the student's values in a term of this kind, at a site that the teacher names so, come from the teacher's noise."""
    recorded = run.noise.get(name, ())
    if kind == "latent" and isinstance(run.given.get(name), Tensor):  # the elements that it was not given
        return sharing_at(site | {"is_observed": False}, recorded)
    return "given" if kind == "given" else sharing_at(site, recorded)


def sharing_at(site: Any, recorded: tuple[Draw, ...]) -> str:
    """How the student's value at a site comes from the teacher's noise there."""
    fn = site["fn"]
    if site["is_observed"]:
        return "given"
    if draws_nothing(fn):
        return "no noise"
    tape = NoiseTape(recorded, getattr(fn, "batch_shape", ()))
    with torch.no_grad():
        sample_on(tape, fn, *site["args"], **site["kwargs"])
    draws = list(zip(tape.draws, recorded, strict=False))
    if any(mine.law is not theirs.law for mine, theirs in draws):
        return "converted"
    if any(mine.noise.shape != theirs.noise.shape for mine, theirs in draws):
        return "partly shared"
    return mechanism(fn)


def mechanism(fn: Any) -> str:
    """How a family is drawn as a function of noise: ``"direct"``, ``"tape"``, ``"explicit map"`` or ``"explicit map inside"``."""
    fn = unwrapped(fn)
    if type(fn) in DIRECT:
        return "direct"
    new = replayable(fn)
    if new is fn:
        return "tape"
    return "explicit map" if type(new) is not type(fn) else "explicit map inside"
