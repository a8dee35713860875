"""What can be known about a distillation before training: which sites are paired, and all problems at once.

A loss stops at the first problem. :func:`check` continues where it can: it collects the errors and warnings of every stage of one
run of the pair, and leaves both programs, the random streams and Pyro's parameter store unchanged.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine

from pyro_kd.diagnosis.check_local_steps import problems_of_local_steps
from pyro_kd.diagnosis.check_problems import LenientGiveMessenger, LenientReplayMessenger, Problems
from pyro_kd.diagnosis.check_report import CheckReport, Problem, SiteCheck
from pyro_kd.diagnosis.check_rows import fresh_row, row_of
from pyro_kd.diagnosis.paired_draws import single_particle
from pyro_kd.diagnosis.reports import sharing_of
from pyro_kd.errors import PyroKDError, listing
from pyro_kd.isolation.effects import guarded, without_effect
from pyro_kd.isolation.freezing import is_frozen
from pyro_kd.losses.advising import advice_of
from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.constraints import check_parameters
from pyro_kd.losses.evaluation import Evaluator, Particle
from pyro_kd.losses.finite import check_finite_loss, check_finite_terms
from pyro_kd.losses.first_run import look_at_first_run
from pyro_kd.losses.interface import terms_in
from pyro_kd.losses.learning import (
    check_store_holds_own,
    check_student_learns,
    unreached_parameters,
    warn_of_other_shapes,
)
from pyro_kd.losses.left_out import check_left_out
from pyro_kd.losses.mode_warning import warn_of_modes
from pyro_kd.losses.ownership import check_no_shared_leaves, check_no_shared_parameters, teacher_leaves
from pyro_kd.losses.paired_run import PairedRun, check_inputs, pair_up, run_student
from pyro_kd.losses.program_pair import ProgramPair
from pyro_kd.losses.recording import record_teacher
from pyro_kd.losses.targets import require_targets
from pyro_kd.losses.terms import SiteTerm, parts_of
from pyro_kd.losses.validation import without_validation
from pyro_kd.noise.between import BetweenDraw
from pyro_kd.sites.classification import compared_sites
from pyro_kd.sites.pairing import SitePair, names_in_student
from pyro_kd.sites.tracing import displaced_params
from pyro_kd.utils.advice import advising
from pyro_kd.utils.autograd import leaves_of

__all__ = ["check"]

Program = Callable[..., Any]


@torch.inference_mode(False)
def check(
    loss: DistillationLoss,
    student: Program,
    teacher: Program,
    *args: Any,
    raise_errors: bool = False,
    try_capture: bool = True,
    **kwargs: Any,
) -> CheckReport:
    """Run a pair of programs once, without training, and report what the loss compares and what is wrong.

    No parameter, gradient, buffer, random stream or entry of Pyro's parameter store changes.

    Args:
        loss: the distillation loss.
        student, teacher: the programs.
        args, kwargs: arguments of both programs.
        raise_errors: raise :class:`~pyro_kd.errors.CheckError` if there are errors; its message lists all of them.
        try_capture: find out whether the loss can be compiled, by tracing it. For a sequence of hundreds of steps this takes a minute
            or more.

    Returns:
        The report: a table of sites, and all problems.

    Raises:
        TypeError: ``loss`` is not a distillation loss.
        CheckError: there are errors, and ``raise_errors`` is set.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd import SurrogateKD, check
        >>> def program(loc, name):
        ...     def model():
        ...         z = pyro.sample(name, dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.5))
        ...     return model
        >>> loc = torch.tensor(1.0, requires_grad=True)
        >>> report = check(SurrogateKD(["x"]), program(loc, "w"), program(0.0, "z"))
        >>> report.is_ok
        False
        >>> report.errors[0].text[:40]
        "site 'z' is in the teacher only; the stu"
        >>> check(SurrogateKD(["x"], site_map={"w": "z"}), program(loc, "w"), program(0.0, "z")).is_ok
        True
    """
    single = single_particle(loss)
    if loss.combines_particles:
        single.num_particles, single.vectorize_particles = loss.num_particles, loss.vectorize_particles
    checker = _Checker(single, student, teacher, args, kwargs)
    report = checker.run(try_capture)
    return report.raise_errors() if raise_errors else report


class _Checker:
    """One check: runs the stages of a loss, and keeps the errors and warnings of each."""

    def __init__(self, loss: DistillationLoss, student: Program, teacher: Program, args: Any, kwargs: Any) -> None:
        self.loss, self.student, self.teacher, self.args, self.kwargs = loss, student, teacher, args, kwargs
        loss.compile_options = None
        self.known = ProgramPair(student, teacher)
        self.evaluator = Evaluator(loss, self.known)
        self.known.has_agreeing_modes = self.known.has_checked_factors = True  # both are checked below
        self.problems = Problems()
        self.sites: list[SiteCheck] = []
        self.between: list[BetweenDraw] = []
        self.unreached: list[str] = []
        self.is_captured: bool | None = None
        self.why_not_captured = ""

    def run(self, try_capture: bool) -> CheckReport:
        with _unchanged_store(), torch.enable_grad(), advising(advice_of(self.loss)):
            with without_effect(self.student, self.teacher), self.problems.collecting():
                try:
                    self._pair()
                except PyroKDError:
                    raise
                except ValueError as error:  # a distribution has rejected its parameters: continue without validation
                    self.problems.add(error)
                    with without_validation():
                        self._pair()
            if not self.problems.has_errors:
                with without_effect(self.student, self.teacher):
                    self.problems.found += problems_of_local_steps(self.loss, self.known, self.args, self.kwargs)
            if try_capture and not self.problems.has_errors:
                with without_effect(self.student, self.teacher):
                    self._capture()
        problems = self.problems.errors_first()
        found = tuple(self.sites), problems, tuple(self.between), tuple(self.unreached)
        return CheckReport(*found, self.is_captured, self.why_not_captured)

    def _pair(self) -> None:
        loss = self.loss
        if not loss.shares_noise:
            self._particle()
            return
        self.known.between.begin()
        with self.problems.while_running("teacher"):
            taught = record_teacher(self.teacher, loss.targets, self.args, self.kwargs, self.known, loss.target_values)
        with self.problems.collecting():
            require_targets(taught.finder.names, taught.sites, loss.targets, taught.finder.observed)
        replay = LenientReplayMessenger(self.problems, taught.noise, loss.site_map, loss.fresh, looks_between=True)
        with suppress(Exception):  # what is wrong is found below
            self.evaluator.look_at_latents(self.args, self.kwargs)
        given = self.evaluator.given(taught.sites, taught.finder.names.keys())
        give = taught.giver(given, loss.site_map, replay, LenientGiveMessenger)
        with self.problems.while_running("student"):
            student = run_student(self.student, taught, replay, give, self.args, self.kwargs)
        self.between = [*taught.noise.lost_between, *replay.between]
        self.known.between.note(taught.noise, replay.between, is_fresh="*" in loss.fresh)
        pairs, error = pair_up(taught, student, replay, give, loss.site_map, loss.fresh)
        if error is not None:
            self.problems.found.append(Problem(True, str(error), error))
        with self.problems.collecting():
            check_inputs(taught, student, give, loss.site_map, loss.fresh, (self.args, self.kwargs))
        idle = [name for name in sorted(loss.fresh - {"*"}) if name not in taught.trace.nodes and name not in student.nodes]
        if idle:
            self.problems.found.append(
                Problem(False, f"fresh lists {listing(idle)}, but neither program has such a site in this run.")
            )
        with self.problems.collecting():
            check_parameters(student)
        run = PairedRun(pairs, student, taught.trace, taught.noise, given)
        with self.problems.collecting():
            look_at_first_run(run, loss.site_map, set(), compares_conditionals=loss.compares_conditionals)
            check_left_out(run, loss.site_map, loss.fresh)
        self._parameters(self._terms(run), run)

    def _particle(self) -> None:
        """Run a loss that does not share noise, as it is evaluated in training: its first problem ends the check."""
        (particle,) = self.evaluator.particles(self.args, self.kwargs, report=True, keep_noise=True)[:1]
        run, terms = particle
        with self.problems.collecting():
            look_at_first_run(run, self.loss.site_map, set(), compares_conditionals=self.loss.compares_conditionals)
            check_left_out(run, self.loss.site_map, self.loss.fresh)
        with self.problems.collecting():
            check_parameters(run.student)
        to_student = names_in_student(self.loss.site_map)
        by_name = {term.name: term for term in terms}
        for pair in run.pairs:
            self.sites.append(
                row_of(
                    pair,
                    to_student.get(pair.name, pair.name),
                    "target" if pair.is_target else "latent",
                    "given",
                    by_name.get(pair.name),
                )
            )
        with self.problems.collecting():
            check_finite_terms(terms)
        self._parameters(terms, run)

    def _terms(self, run: PairedRun) -> list[SiteTerm]:
        """The terms of the pairs that can be compared. Adds a row for each pair to ``sites``."""
        loss, terms = self.loss, list[SiteTerm]()
        to_student = names_in_student(loss.site_map)
        for pair in run.pairs:
            twin = to_student.get(pair.name, pair.name)
            found, before = list[SiteTerm](), len(self.problems.found)
            with self.problems.collecting() if self._counts(pair, run) else _silent():
                guard = partial(guarded, self.teacher, [pair.p], [pair.q])
                found = self.evaluator.terms_of(replace(run, pairs=[pair], guard=guard), report=True)
                check_finite_terms(found)
                terms += found
            self.problems.drop_repeated(twin, self.problems.found[before:])
            rows: list[SiteTerm | None] = [*found] or [None]
            for row in rows:
                kind = row.kind if row is not None else "target" if pair.is_target else "latent"
                noise = "-"
                with _silent():
                    noise = sharing_of(kind, pair.name, run, run.student.nodes[twin])
                self.sites.append(row_of(pair, twin, kind, noise, row))
        for trace, own in ((run.student, ""), (run.teacher, "teacher's")):
            for name, site in compared_sites(trace).items():
                if loss.fresh & {name, "*"} and name not in [row.name for row in self.sites]:
                    self.sites.append(fresh_row(name, site, own))
        return terms

    def _counts(self, pair: SitePair, run: PairedRun) -> bool:
        parts = parts_of(pair, run, self.loss.latent_weight, self.loss.given_weight)
        return any(part.weight != 0 for part in parts)

    def _parameters(self, terms: list[SiteTerm], run: PairedRun) -> None:
        """Check which of the student's parameters are trained, and that it shares none with the teacher."""
        known = self.known
        with self.problems.collecting():
            warn_of_other_shapes(run.student)
        with self.problems.collecting():
            if not is_frozen(self.teacher):
                check_no_shared_parameters(run.student, run.teacher, self.student, self.teacher)
            if self.loss.shares_noise:
                leaves = teacher_leaves(run, known, self.teacher, self.args, self.kwargs)
                check_no_shared_leaves(run.student, leaves, self.student, self.teacher)
        counted = [term for term in terms if term.weight != 0]
        displaced = displaced_params(run.student)
        missing = {pair.name for pair in run.pairs if self._counts(pair, run)} - {term.site for term in counted}
        is_sum = not self.loss.combines_particles and self.loss.discrete_gradient == "cut"
        if is_sum and counted and not missing:  # a missing term might reach further parameters
            with self.problems.collecting():
                total = torch.stack([term.value for term in counted]).sum()
                self.unreached = unreached_parameters([total], self.student, run.student)
                check_student_learns(total)
                check_store_holds_own(leaves_of([total]), displaced)
        if self.problems.has_errors:
            return  # the remaining checks run the pair again
        particles = [Particle(run, counted)]
        if not is_sum:
            with self.problems.collecting():
                particles = self.evaluator.particles(self.args, self.kwargs, report=False)
                total = self.evaluator.trained(particles, self.args, self.kwargs)
                check_finite_loss(total, terms_in(particles))
                check_student_learns(total)
                self.unreached = unreached_parameters([total], self.student, run.student)
                check_store_holds_own(leaves_of([total]), displaced)
            if self.problems.has_errors:
                return
        with self.problems.collecting():
            self.evaluator.check_learning(total, particles, self.args, self.kwargs)
        with self.problems.collecting():
            again = partial(self.evaluator.terms_of_new_run, self.args, self.kwargs)
            warn_of_modes(self.student, self.teacher, again)

    def _capture(self) -> None:
        """Find out whether the loss can be captured. A copy is captured, so that the loss itself does not change."""
        captured = copy.copy(self.loss).compile(backend=None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                captured.differentiable_loss(self.student, self.teacher, *self.args, **self.kwargs)
            except Exception as error:
                self.is_captured, self.why_not_captured = False, f"{type(error).__name__}: {error}"
                return
        reasons = [str(w.message) for w in caught if "without a graph" in str(w.message)]
        self.is_captured = not reasons
        self.why_not_captured = reasons[0].partition(": ")[2] if reasons else ""


@contextmanager
def _silent() -> Iterator[None]:
    """Ignore errors and warnings inside the context: what they are about is left out of the report."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (PyroKDError, NotImplementedError, ValueError):
        pass


@contextmanager
def _unchanged_store() -> Iterator[None]:
    """Remove what is added to Pyro's parameter store inside the context."""
    store = pyro.get_param_store()
    before = set(store.keys())
    with poutine.block():
        try:
            yield
        finally:
            for name in set(store.keys()) - before:
                del store[name]
