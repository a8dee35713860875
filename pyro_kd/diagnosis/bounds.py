"""Bounds on the KL between two programs from both sides, and the KL itself where it can be computed.

Input: two programs and their targets. Output: a :class:`~pyro_kd.diagnosis.bound_table.BoundReport`. It shows how loose the bounds
are for these programs, which cannot be seen from a loss.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from typing import Any

import torch
from pyro import poutine

from pyro_kd.diagnosis.bound_table import BoundReport, samples_line
from pyro_kd.diagnosis.lower_bound import FEWEST_ROWS, LowerBound, nwj_bound
from pyro_kd.diagnosis.program_cost import cost_of
from pyro_kd.diagnosis.sample_bounds import check_sample_numbers, sample_bounds
from pyro_kd.diagnosis.target_samples import TargetSamples, held_plates, rows_drawn, target_samples
from pyro_kd.errors import (
    PlateMismatchError,
    PyroKDError,
    SupportMismatchError,
    UnknownTargetError,
    UnsupportedDivergenceError,
    listing,
)
from pyro_kd.isolation.effects import undisturbed
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.losses import LocalKD, MarginalKD, SurrogateKD
from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.left_out import check_left_out
from pyro_kd.losses.paired_run import PairedRun, run_pair
from pyro_kd.losses.targets import Targets
from pyro_kd.metrics import Classifier, Estimate
from pyro_kd.noise.point_masses import is_point
from pyro_kd.noise.statements import is_statement
from pyro_kd.sites.enumeration import MAX_STATES
from pyro_kd.utils.advice import Advice, advising
from pyro_kd.utils.display import first_line
from pyro_kd.utils.randomness import keeping_random_state, set_seed

__all__ = ["BoundReport", "bound_report"]

Program = Callable[..., Any]


_ADVICE = Advice(
    "bound_report",
    frozenset(("site_map", "fresh", "max_states")),
    instead="go by the other lines of the report",
    is_final=True,
)


@advising(_ADVICE)
@keeping_random_state()
def bound_report(
    student: Program,
    teacher: Program,
    targets: Targets,
    *args: Any,
    num_samples: int = 20,
    site_map: Mapping[str, str] | None = None,
    fresh: Collection[str] = (),
    sample_numbers: Sequence[int] = (4, 16, 64),
    upper_bounds: Mapping[str, DistillationLoss] | None = None,
    level: float = 0.95,
    classifier_rows: int = 10_000,
    classifier: Classifier | None = None,
    max_states: int = MAX_STATES,
    seed: int | None = None,
    **kwargs: Any,
) -> BoundReport:
    r"""Enclose :math:`KL(p_\phi(y|x) \| p_\theta(y|x))` between a lower bound and upper bounds, and add the exact KL.

    .. math:: E_{p_\phi}[f] - E_{p_\theta}[e^f] + 1 \le KL \le L_K,\; L_{local},\; L_{surrogate} = L_1

    The lower bound holds for every function f. A classifier of the targets of teacher and student finds one on half of the
    rows, and others give the bound (Nguyen, Wainwright and Jordan), with a Bernstein limit. The surrogate bound is
    Proposition 3.1 of the paper, the local bound follows from the chain rule; neither dominates the other. The bound of K samples
    (:class:`~pyro_kd.losses.multi_sample.MultiSampleKD`) is the surrogate bound for K = 1, does not increase, and tends to the KL.
    The exact KL is computed where every latent of both programs is discrete (:class:`~pyro_kd.losses.marginal.MarginalKD`).
    Where a mask hides elements of the targets, the KL is that of the others. docs/certificate.md says what each line means, and what
    it does not say.

    **Cost.** Runs of both programs dominate: ``num_samples`` for each line, and for the lower bound ``classifier_rows`` divided by
    the rows of a call, at most ten times ``num_samples``. So a program with many sites and few rows a call is slow, and runs mostly
    for the lower bound. More rows a call, or fewer ``classifier_rows``, shorten it, the latter at the price of a lower bound that is
    not as tight. Next comes the classifier, and then the bounds of K samples, which ``sample_numbers=()`` leaves out.

    Args:
        student, teacher: the programs.
        targets: the teacher's names of the target sites, or, as for a loss, a predicate or None.
        args, kwargs: arguments of both programs.
        num_samples: number of runs; each upper bound is the mean over these runs.
        site_map: student's site name -> teacher's, where they differ.
        fresh: latent sites of either program without a counterpart.
        sample_numbers: the numbers K of samples, each at least 2, of further upper bounds; () for none. They cost little where the
            rows of a batch serve each other as samples. Otherwise each run has K times as many rows, and large programs take fewer
            runs. Only bounds of at least 1,000 rows are shown, all runs together.
        upper_bounds: further losses whose mean bounds the KL from above, by the names of their lines.
        level: the probability with which the interval between the limits covers the KL.
        classifier_rows: the number of rows of each program for the lower bound, from at most ten times ``num_samples`` runs.
        classifier: an unfitted classifier with ``fit`` and ``predict_proba``. By default, relative frequencies where
            the targets have few values, and otherwise one of scikit-learn.
        max_states: the largest table for the exact value, see :class:`~pyro_kd.losses.marginal.MarginalKD`.
        seed: of the noise; None takes it from where the random streams stand. These are left as they were, so that two reports
            have the same noise unless they have different seeds.

    Returns:
        The report. Its ``str`` is a table. A figure that cannot be computed is None, and ``reasons`` has the reason.

    Raises:
        UnsupportedDivergenceError: a target is a point mass in both programs.
        PlateMismatchError: ``poutine.scale`` scales a site.
        TypeError, ValueError: ``num_samples``, ``sample_numbers``, ``level`` or ``upper_bounds`` is not as described.
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
        >>> print("\n".join(str(report).splitlines()[:10]))
        KL(teacher || student)      nats per row       limit
        ----------------------------------------------------
        lower bound             0.02629 ± 0.0024  >= 0.01649
        exact                        0.02966 ± 0           -
        64 samples              0.02861 ± 0.0019    <= 0.034
        16 samples              0.04252 ± 0.0029   <= 0.0509
        4 samples               0.06974 ± 0.0035  <= 0.07985
        local bound                  0.08718 ± 0  <= 0.08718
        surrogate bound          0.1652 ± 0.0028   <= 0.1732
        the KL lies between 0.01649 and 0.034 nats per row, at a level of 95 %
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, such as 0.95, not {level}")
    for name, loss in (upper_bounds or {}).items():
        if not isinstance(loss, DistillationLoss):
            raise TypeError(f"upper_bounds[{name!r}] must be a distillation loss, such as LocalKD(['x']), not {loss!r:.60}")
    numbers = check_sample_numbers(sample_numbers)
    options: dict[str, Any] = {"site_map": site_map, "fresh": fresh}
    with evaluation_mode(student):
        set_seed(seed)
        surrogate = SurrogateKD(targets, latent_weight=0.0, teacher_forcing=0.0, **options)
        with torch.enable_grad(), poutine.block():
            run = run_pair(
                student,
                teacher,
                args,
                kwargs,
                targets=surrogate.targets,
                known=surrogate._pairs.of(student, teacher),
                **options,
            )
        names = [pair.name for pair in run.pairs if pair.is_target]
        check_left_out(run, site_map or {}, fresh)
        _require_densities(run)
        _require_unscaled(run)
        rows = prod(size for _, size in held_plates(run.teacher).values())
        drawn = rows_drawn(run.teacher)
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
            reasons["local"] = first_line(error)
        others = {name: over_runs(loss) for name, loss in (upper_bounds or {}).items()}
        exact = lower = distance = None
        with undisturbed(student, teacher):
            try:
                exact = _exact(over_runs, names, site_map, max_states, num_samples)
            except UnknownTargetError as error:
                reasons["exact"] = f"which targets a run has depends on its draws: {first_line(error)}"
            except (UnsupportedDivergenceError, PlateMismatchError) as error:
                reasons["exact"] = first_line(error)
            try:
                samples = target_samples(
                    surrogate, student, teacher, args, kwargs, rows=classifier_rows, most_runs=10 * num_samples
                )
                distance = Estimate.of(samples.distances * (samples.rows / rows))
                lower = _lower(samples, rows, level, classifier)
            except (PyroKDError, ModuleNotFoundError) as error:
                reasons["lower"] = first_line(error)
        samples_above, why = sample_bounds(
            numbers,
            student,
            teacher,
            args,
            kwargs,
            run=run,
            over_runs=over_runs,
            num_samples=num_samples,
            options=options | {"targets": targets},
        )
        reasons |= {samples_line(number): reason for number, reason in why.items()}
        with poutine.block():
            costs = {
                name: cost_of(program, args, kwargs, drawn) for name, program in (("student", student), ("teacher", teacher))
            }
        report = BoundReport(bound, local, exact, rows, reasons, lower, others, level, distance, costs, samples_above, drawn)
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


def _require_unscaled(run: PairedRun) -> None:
    """Raise PlateMismatchError where ``poutine.scale`` changes the share of a site: what the lines bound is then no KL."""
    for pair in run.pairs:
        share = prod(frame.full_size / frame.size for frame in pair.plates if frame.full_size and frame.size)
        scale = torch.as_tensor(pair.scale).double()
        if not torch.allclose(scale, torch.full_like(scale, share), rtol=1e-5):
            raise PlateMismatchError(
                f"site {pair.name!r} is scaled by poutine.scale, as it is for annealing, so that the bounds would be of no KL. Pass "
                "the programs without it."
            )


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
                "point masses by their distance, which does not bound the KL. If the point mass is a function of draws alone, and "
                f"of no parameter, use these as targets; the teacher draws {listing(draws)}."
            )
