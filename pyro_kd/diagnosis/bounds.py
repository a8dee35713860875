"""Bounds on the KL between two programs from both sides, and the KL itself where it can be computed.

Input: two programs and their targets. Output: :class:`BoundReport`. It shows how loose the bounds are for these programs, which
cannot be seen from a loss.
"""

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from statistics import NormalDist
from typing import Any

import torch
from pyro import poutine

from pyro_kd.diagnosis.lower_bound import FEWEST_ROWS, LowerBound, nwj_bound
from pyro_kd.diagnosis.program_cost import ProgramCost, cost_of
from pyro_kd.diagnosis.target_samples import TargetSamples, held_plates, target_samples
from pyro_kd.errors import (
    PlateMismatchError,
    PyroKDError,
    SupportMismatchError,
    UnknownTargetError,
    UnsupportedDivergenceError,
    listing,
)
from pyro_kd.isolation.effects import undisturbed
from pyro_kd.losses import LocalKD, MarginalKD, SurrogateKD
from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.paired_run import PairedRun, run_pair
from pyro_kd.losses.targets import Targets
from pyro_kd.metrics import Classifier, Estimate
from pyro_kd.noise.point_masses import is_point
from pyro_kd.noise.statements import is_statement
from pyro_kd.sites.enumeration import MAX_STATES
from pyro_kd.utils.tables import figure, format_table, html_table, plus_minus

__all__ = ["BoundReport", "bound_report"]

Program = Callable[..., Any]
_HEADER = ["KL(teacher || student)", "nats per row", "limit"]


@dataclass(frozen=True)
class BoundReport:
    """The table that :func:`bound_report` returns. Its figures are in nats per row.

    Attributes:
        surrogate: the surrogate bound on KL(teacher || student), the target terms of SurrogateKD.
        local: the local bound, the KL of the joint distributions; None where latents cannot be compared.
        exact: KL(teacher || student) of the targets; None where latents cannot be summed out.
        rows: number of rows per call: the product of the sizes of the plates that hold every site; 1 where there is none.
        reasons: why a figure is None, by the figure's name.
        lower: the lower bound of a classifier; None where there are too few rows.
        others: further upper bounds by name.
        level: of the interval.
        distance: the mean squared distance of the targets on shared noise, per row; None where the lower bound is. It bounds the
            squared Wasserstein-2 distance of the two laws from above.
        costs: memory and time of the student and the teacher, by name.
    """

    surrogate: Estimate
    local: Estimate | None
    exact: Estimate | None
    rows: int
    reasons: Mapping[str, str] = field(default_factory=dict)
    lower: LowerBound | None = None
    others: Mapping[str, Estimate] = field(default_factory=dict)
    level: float = 0.95
    distance: Estimate | None = None
    costs: Mapping[str, ProgramCost] = field(default_factory=dict)

    @property
    def upper_bounds(self) -> dict[str, Estimate]:
        """All bounds from above, by name."""
        found = {**self.others, "local bound": self.local, "surrogate bound": self.surrogate}
        return {name: bound for name, bound in found.items() if bound is not None}

    @property
    def upper_limits(self) -> dict[str, float]:
        """The upper confidence limit of each bound from above, by name. All of them hold together."""
        bounds = self.upper_bounds
        confidence = 1 - (1 - self.level) / 2 / len(bounds)
        return {name: _upper_limit(bound, confidence) for name, bound in bounds.items()}

    @property
    def interval(self) -> tuple[float, float]:
        """An interval that covers the KL with probability ``level``: from the lower limit to the least of the upper limits."""
        return (self.lower.limit if self.lower else 0.0), max(min(self.upper_limits.values()), 0.0)

    @property
    def is_inconsistent(self) -> bool:
        """Whether the lower limit is above an upper limit: then one of the bounds does not hold for these programs."""
        low, high = self.interval
        return low > high

    def __str__(self) -> str:
        return "\n".join([format_table(_HEADER, self._cells()), *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._cells(), self._notes())

    def _cells(self) -> list[list[str]]:
        limits = {name: f"<= {figure(limit)}" for name, limit in self.upper_limits.items()}
        lower = [plus_minus(self.lower.estimate), f">= {figure(self.lower.limit)}"] if self.lower else ["-", "-"]
        names = [*self.others, "local bound", "surrogate bound"]
        above = [[name, plus_minus(self.upper_bounds.get(name)), limits.get(name, "-")] for name in names]
        return [["lower bound", *lower], ["exact", plus_minus(self.exact), "-"], *above]

    def _notes(self) -> list[str]:
        low, high = self.interval
        percent = f"{100 * self.level:.3g} %"
        notes = [f"the KL lies between {figure(low)} and {figure(high)} nats per row, at a level of {percent}"]
        if self.is_inconsistent:
            notes = [_INCONSISTENT.format(figure(low), figure(high), percent)]
        notes.append(f"± standard error over {self.surrogate.num_samples} runs of {self.rows} row{'s' * (self.rows != 1)}")
        if self.distance is not None:
            notes.append(f"squared distance on shared noise: {plus_minus(self.distance)} per row")
        if self.costs:
            notes.append("; ".join(f"{name}: {cost}" for name, cost in self.costs.items()))
        return [*notes, *[f"{_TITLES.get(name, name)}: {reason}" for name, reason in self.reasons.items()]]

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values, for ``json.dump``."""
        return asdict(self) | {"interval": list(self.interval), "is_inconsistent": self.is_inconsistent}


_TITLES = {"local": "local bound", "lower": "lower bound"}
_INCONSISTENT = (
    "INCONSISTENT: the lower limit {} is above an upper limit, {}, at a level of {}: one of them does not hold. Are the rows "
    "of the plates independent, and does each program draw all of its noise at sample sites?"
)


def bound_report(
    student: Program,
    teacher: Program,
    targets: Targets,
    *args: Any,
    num_samples: int = 20,
    site_map: Mapping[str, str] | None = None,
    fresh: Collection[str] = (),
    upper_bounds: Mapping[str, DistillationLoss] | None = None,
    level: float = 0.95,
    classifier_rows: int = 10_000,
    classifier: Classifier | None = None,
    max_states: int = MAX_STATES,
    **kwargs: Any,
) -> BoundReport:
    r"""Enclose :math:`KL(p_\phi(y|x) \| p_\theta(y|x))` between a lower bound and upper bounds, and add the exact KL.

    .. math:: E_{p_\phi}[f] - E_{p_\theta}[e^f] + 1 \le KL \le L_{surrogate},\; L_{local}

    The lower bound holds for every function f. A classifier of the targets of teacher and student finds one on half of the
    rows, and others give the bound (Nguyen, Wainwright and Jordan), with a Bernstein limit. The surrogate bound is
    Proposition 3.1 of the paper, the local bound follows from the chain rule; neither dominates the other. The exact KL is computed
    where every latent of both programs is discrete (:class:`~pyro_kd.losses.marginal.MarginalKD`). docs/certificate.md says what each
    line means, and what it does not say.

    Args:
        student, teacher: the programs.
        targets: the teacher's names of the target sites, or, as for a loss, a predicate or None.
        *args, **kwargs: arguments of both programs.
        num_samples: number of runs; each upper bound is the mean over these runs.
        site_map: student's site name -> teacher's, where they differ.
        fresh: latent sites of either program without a counterpart.
        upper_bounds: further losses whose mean bounds the KL from above, by the names of their lines.
        level: the probability with which the interval between the limits covers the KL.
        classifier_rows: the number of rows of each program for the lower bound, from at most ten times ``num_samples`` runs.
        classifier: an unfitted classifier with ``fit`` and ``predict_proba``. By default, relative frequencies where
            the targets have few values, and otherwise one of scikit-learn.
        max_states: the largest table for the exact value, see :class:`~pyro_kd.losses.marginal.MarginalKD`.

    Returns:
        The report. Its ``str`` is a table. A figure that cannot be computed is None, and ``reasons`` has the reason.

    Raises:
        UnsupportedDivergenceError: a target is a point mass in both programs.
        PyroKDError: as for :class:`~pyro_kd.losses.surrogate.SurrogateKD`.

    Warns:
        UserWarning: the lower limit is above an upper limit.

    References:
        Chen, Liang, Zeng, Yao and Shao, A Unified Knowledge Distillation Framework for Deep Directed Graphical Models,
        CVPR 2023. Nguyen, Wainwright and Jordan, Estimating Divergence Functionals and the Likelihood Ratio by Convex Risk
        Minimization, IEEE Transactions on Information Theory 56, 2010.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd.diagnosis.bounds import bound_report
        >>> def coin(heads):
        ...     def model():
        ...         with pyro.plate("rows", 500):
        ...             z = pyro.sample("z", dist.Bernoulli(heads))
        ...             pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * z))
        ...     return model
        >>> pyro.set_rng_seed(1)
        >>> report = bound_report(coin(0.7), coin(0.5), ["y"])
        >>> print("\n".join(str(report).splitlines()[:7]))
        KL(teacher || student)      nats per row       limit
        ----------------------------------------------------
        lower bound             0.02629 ± 0.0024  >= 0.01649
        exact                        0.02966 ± 0           -
        local bound                  0.08718 ± 0  <= 0.08718
        surrogate bound          0.1652 ± 0.0028    <= 0.172
        the KL lies between 0.01649 and 0.08718 nats per row, at a level of 95 %
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, such as 0.95, not {level}")
    for name, loss in (upper_bounds or {}).items():
        if not isinstance(loss, DistillationLoss):
            raise TypeError(f"upper_bounds[{name!r}] must be a distillation loss, such as LocalKD(['x']), not {loss!r:.60}")
    options: dict[str, Any] = {"site_map": site_map, "fresh": fresh}
    surrogate = SurrogateKD(targets, latent_weight=0.0, teacher_forcing=0.0, **options)
    with torch.no_grad(), poutine.block():
        run = run_pair(
            student, teacher, args, kwargs, targets=surrogate.targets, known=surrogate._pairs.of(student, teacher), **options
        )
    names = [pair.name for pair in run.pairs if pair.is_target]
    _require_densities(run)
    rows = prod(size for _, size in held_plates(run.teacher).values())
    reasons = dict[str, str]()

    def over_runs(loss: DistillationLoss, runs: int = num_samples) -> Estimate:
        with poutine.block():
            return Estimate.of(
                torch.tensor([loss.loss(student, teacher, *args, **kwargs) / rows for _ in range(runs)]).double()
            )

    bound, local = over_runs(surrogate), None
    try:
        local = over_runs(LocalKD(targets, **options))
    except (SupportMismatchError, UnsupportedDivergenceError) as error:
        reasons["local"] = _first_line(error)
    others = {name: over_runs(loss) for name, loss in (upper_bounds or {}).items()}
    exact = lower = distance = None
    with undisturbed(student, teacher):
        try:
            exact = _exact(over_runs, names, site_map, max_states, num_samples)
        except UnknownTargetError as error:
            reasons["exact"] = f"which targets a run has depends on its draws: {_first_line(error)}"
        except (UnsupportedDivergenceError, PlateMismatchError) as error:
            reasons["exact"] = _first_line(error)
        try:
            samples = target_samples(
                surrogate, student, teacher, args, kwargs, rows=classifier_rows, most_runs=10 * num_samples
            )
            distance = Estimate.of(samples.distances)
            lower = _lower(samples, rows, level, classifier)
        except (PyroKDError, ModuleNotFoundError) as error:
            reasons["lower"] = _first_line(error)
    with poutine.block():
        costs = {
            name: cost_of(program, args, kwargs, rows) for name, program in (("student", student), ("teacher", teacher))
        }
    report = BoundReport(bound, local, exact, rows, reasons, lower, others, level, distance, costs)
    if report.is_inconsistent:
        warnings.warn(report._notes()[0], stacklevel=2)
    return report


def _exact(
    over_runs: Callable[..., Estimate],
    names: Collection[str],
    site_map: Mapping[str, str] | None,
    max_states: int,
    num_samples: int,
) -> Estimate:
    """The exact KL: by a sum over all values of the targets if possible, and otherwise over drawn ones."""
    options: dict[str, Any] = {"site_map": site_map, "max_states": max_states}
    try:
        return over_runs(MarginalKD(names, enumerate_targets=True, **options), min(num_samples, 2))
    except (UnsupportedDivergenceError, PlateMismatchError):
        return over_runs(MarginalKD(names, **options))


def _lower(samples: TargetSamples, rows: int, level: float, classifier: Classifier | None) -> LowerBound:
    """The lower bound per row. Where the rows of a run depend on each other, it is that of a whole run, divided by its rows."""
    if len(samples.teacher) < FEWEST_ROWS:
        raise UnsupportedDivergenceError(
            f"there are {len(samples.teacher)} rows of each program, too few for a classifier and a limit: it takes {FEWEST_ROWS}. "
            "Raise num_samples, or pass more rows to the programs"
        )
    found = nwj_bound(samples.teacher, samples.student, confidence=(1 + level) / 2, classifier=classifier)
    share = samples.rows / rows
    estimate = Estimate(found.estimate.mean * share, found.estimate.standard_error * share, found.estimate.num_samples)
    return LowerBound(estimate, found.limit * share)


def _upper_limit(bound: Estimate, confidence: float) -> float:
    """The one-sided limit of a mean over runs, by Student's t distribution; infinite for a single run.

    Its quantile by the expansion in Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    if bound.num_samples < 2:
        return math.inf
    z, n = NormalDist().inv_cdf(confidence), bound.num_samples - 1
    t = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return bound.mean + t * bound.standard_error


def _require_densities(run: PairedRun) -> None:
    """Raise where a target is a point mass in both programs."""
    draws = [
        name
        for name, site in run.teacher.nodes.items()
        if site["type"] == "sample" and not is_point(site["fn"]) and not is_statement(site)
    ]
    for pair in run.pairs:
        if pair.is_target and is_point(pair.p) and is_point(pair.q):
            raise UnsupportedDivergenceError(
                f"target {pair.name!r} is a point mass (Delta) in both programs, so the KL is 0 or infinite. The losses compare "
                "point masses by their distance, which does not bound the KL. Use as targets the draws that the point mass is a "
                f"function of; the teacher draws {listing(draws)}."
            )


def _first_line(error: Exception) -> str:
    """The message without the shapes that Pyro adds to it."""
    return str(error).strip().split("\n")[0]
