r"""What every distillation loss shares: run teacher and student, pair sites, add up divergences.

    teacher --record_noise--> (trace, noise) --> student: condition + replay_noise --> trace
        --> pair sites --> d(p, q) per site --> scale, mask, weight --> one scalar

A loss of its own kind says in :meth:`DistillationLoss.given_sites` which of the teacher's values the student is given;
what is not given becomes a function of the shared noise. :class:`~pyro_kd.losses.surrogate.SurrogateKD` gives the
targets, :class:`~pyro_kd.losses.local.LocalKD` everything.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import unwrap
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from pyro_kd.divergences import Divergence, DivergenceFunction, kl
from pyro_kd.errors import PyroKDError, UnsupportedDivergenceError
from pyro_kd.isolation.freezing import FrozenProgram, without_grad
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.isolation.programs import require_callable
from pyro_kd.isolation.reaching import Reached
from pyro_kd.isolation.registration import Registered
from pyro_kd.losses.between_sites import BetweenSites
from pyro_kd.losses.captured import CapturedLoss
from pyro_kd.losses.checks import (
    check_finite_gradients,
    check_finite_terms,
    check_no_shared_leaves,
    check_no_shared_parameters,
    check_parameters_are_reached,
    check_params_are_captured,
    check_student_learns,
    hint_at_swapped,
    is_capturing_params,
    leaves_held_by,
    leaves_of_densities,
    params_of,
)
from pyro_kd.losses.giving import CollectingReplayMessenger, GiveMessenger
from pyro_kd.losses.isolation import guarded, warn_of_modes, without_effect
from pyro_kd.losses.module import DistillationModule
from pyro_kd.losses.observed import warn_of_factors
from pyro_kd.losses.paired_run import PairedRun, Taught, check_inputs, is_frozen, pair_up, record_teacher, run_student
from pyro_kd.losses.parameters import check_parameters
from pyro_kd.losses.stacking import Wanted, totals
from pyro_kd.losses.targets import Targets, Weight, require_targets, weight_of
from pyro_kd.losses.terms import SiteTerm, SiteTerms
from pyro_kd.losses.validation import Validation
from pyro_kd.noise.messengers import ReplayNoiseMessenger
from pyro_kd.noise.record import NoiseRecord
from pyro_kd.noise.streams import StreamWatch, have_moved, states
from pyro_kd.sites.compatibility import check_comparable, check_same_weighting
from pyro_kd.sites.pairing import SitePair
from pyro_kd.sites.tracing import get_trace
from pyro_kd.sites.weighting import compared_elements
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.display import as_html
from pyro_kd.utils.tensors import READERS, tensors_in

__all__ = ["DistillationLoss", "PairedRun"]

Program = Callable[..., Any]


class _Particle(NamedTuple):
    """The loss of one run, and a function that returns the student's parameters that Pyro knows, by name."""

    loss: Tensor
    params: Callable[[], dict[str, Tensor]]


_MAX_PAIRS = 4
"""Of how many pairs of programs a compiled loss keeps the graphs."""


_AROUND_STUDENT = (CollectingReplayMessenger, GiveMessenger, TraceMessenger)
"""The handlers that a student runs in, from the outermost."""


@dataclass(slots=True)
class _Seen:
    """What a loss has checked of the programs, so that each check runs once.

    Attributes:
        signatures: of the pairs of distributions that were found comparable, and whether in a vectorized run.
        programs: the pair of programs, with their sites, that was searched for shared tensors.
        reached: the leaf tensors that its teacher reaches.
        validation: which calls are validated.
        captured: the pair of programs whose parameters SVI was found to train.
        modes: the last pairs of programs whose modes were looked at.
        learning: the pair of programs whose student was found to learn.
        differentiates: the student that ran last without gradients, and whether it needs them inside.
        registered: modules of students that need not be registered with Pyro again.
        between: what is known of draws between sites.
        knows_factors: whether factors were looked for.
    """

    signatures: set[tuple[Any, ...]] = field(default_factory=set)
    programs: tuple[Any, ...] | None = None
    reached: set[Tensor] = field(default_factory=set)
    validation: Validation = field(default_factory=Validation)
    captured: tuple[Any, ...] | None = None
    modes: list[tuple[Any, ...]] = field(default_factory=list)
    learning: tuple[Any, ...] | None = None
    differentiates: tuple[Any, bool] | None = None
    registered: Registered = field(default_factory=lambda: Registered(*_AROUND_STUDENT))
    between: BetweenSites = field(default_factory=BetweenSites)
    knows_factors: bool = False


class DistillationLoss(ELBO):
    """Base class of losses between a teacher and a student program.

    Subclasses Pyro's ELBO with the student as ``model`` and the teacher as ``guide``, the program that is sampled from:
    ``SVI(student, teacher, optim, loss)`` and ``loss(student, teacher)`` work as with any ELBO.

    Args:
        targets: names of the target sites, or a predicate on Pyro's site dictionaries. None: the sites that the
            teacher observes (``obs=``) in the call. Their values are drawn from the teacher all the same. A site that the
            teacher observes and that is no target is an input: both programs keep its value, and it has no term.
        latent_weight: weight of the latent terms: a number, a mapping by site name, or a function of the site name. 0 leaves a
            latent out: it has no term, and the student is not given its value.
        divergence: ``d(p, q, value)`` at target sites, see :mod:`pyro_kd.divergences`.
        latent_divergence: likewise at latent sites.
        latent_reduction: ``"sum"`` over the dimensions of an event, or ``"mean"``.
        site_map: student's site name -> teacher's, where they differ.
        fresh: latent sites of either program without a counterpart; they draw noise of their own and have no term.
        num_particles: number of noise samples to average over.
        max_plate_nesting: as in Pyro's ELBO; needed by ``vectorize_particles`` and guessed otherwise.
        vectorize_particles: draw the particles in one outer plate.
        retain_graph: passed to ``backward``.

    Values at observed sites must be data: the same in both programs, and independent of what is trained. A batch dimension that no
    plate declares is one of independent draws, and an error among vectorized particles.

    Where teacher and student are both point masses (Delta), a divergence of :func:`~pyro_kd.divergences.kl`, or its
    reverse, is taken as :func:`~pyro_kd.divergences.wasserstein2`: their KL is 0 or infinite.
    """

    def __init__(
        self,
        targets: Targets = None,
        *,
        latent_weight: Weight,
        divergence: DivergenceFunction = kl,
        latent_divergence: DivergenceFunction = kl,
        latent_reduction: str = "sum",
        site_map: Mapping[str, str] | None = None,
        fresh: Collection[str] = (),
        num_particles: int = 1,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        if latent_reduction not in ("sum", "mean"):
            raise ValueError(f"latent_reduction must be 'sum' or 'mean', not {latent_reduction!r}")
        for name, function in (("divergence", divergence), ("latent_divergence", latent_divergence)):
            if not callable(function):
                raise TypeError(
                    f"{name} must be a function d(p, q, value), such as pyro_kd.divergences.kl, not {function!r:.60}"
                )
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, not {num_particles}")
        if targets is not None and not callable(targets):
            targets = [targets] if isinstance(targets, str) else targets
            if not isinstance(targets, Iterable):
                raise TypeError(f"targets must be site names, a predicate or None, not {targets!r}")
            targets = list(targets)
        self.targets: Targets = targets
        self.latent_weight = latent_weight
        self.divergence = divergence
        self.latent_divergence = latent_divergence
        self.latent_reduction = latent_reduction
        self.site_map = dict(site_map or {})
        self.fresh = frozenset([fresh] if isinstance(fresh, str) else fresh)
        self._seen = _Seen()
        self._compile_options: dict[str, Any] | None = None
        self._captured: list[tuple[tuple[Program, Program], CapturedLoss]] = []

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying: without what was learned of the programs."""
        return vars(self) | {"_seen": _Seen(), "_captured": []}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self._rows().items())})"

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, self._rows())

    def _rows(self) -> dict[str, str]:
        """What it was made with, where that is not the default."""
        rows = {"targets": _shown(self.targets), "latent_weight": _shown(self.latent_weight)}
        options: list[tuple[str, Any, Any]] = [
            ("divergence", self.divergence, kl),
            ("latent_divergence", self.latent_divergence, kl),
            ("latent_reduction", self.latent_reduction, "sum"),
            ("site_map", self.site_map, {}),
            ("fresh", sorted(self.fresh), []),
            ("num_particles", self.num_particles, 1),
            ("vectorize_particles", self.vectorize_particles, False),
        ]
        return rows | {name: _shown(value) for name, value, default in options if value != default}

    def compile(self, **options: Any) -> "DistillationLoss":
        """From now on, run the programs' handlers once for each kind of arguments, and after that a compiled graph.

        For ``SVI(student, teacher, optim, SurrogateKD(["x"]).compile())``; a loop in plain PyTorch calls ``compile()`` of the bound
        module. See docs/performance.md for what is captured, and when that pays.

        Args:
            **options: ``max_graphs``, how many kinds of arguments get a graph of their own (8); and those of ``torch.compile``:
                ``backend``, ``mode``, ``options``. With ``backend=None`` the graph runs as it is: ready in
                seconds, and without the handlers' cost.

        Returns:
            The loss itself.
        """
        self._compile_options = options
        self._captured = []
        return self

    @abstractmethod
    def given_sites(self, teacher: Mapping[str, Any], targets: Collection[str]) -> Collection[str]:
        """Names of the teacher's sites whose values the student is conditioned on.

        What is compared nowhere is not given all the same: latents of weight 0, and elements that a mask or a scale of 0 removes.

        Args:
            teacher: the teacher's sample sites in execution order: name -> Pyro's site dictionary.
            targets: names of the target sites among them.
        """

    # The interface of Pyro's ELBO: model is the student, guide the teacher.

    def __call__(self, student: Program, teacher: Program) -> DistillationModule:  # type: ignore[override]
        """Bind the loss to two programs: an ``nn.Module`` whose call returns the differentiable loss."""
        _require_programs(student, teacher)
        return DistillationModule(self, student, teacher)

    def loss(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without gradients."""
        with torch.no_grad():
            return sum(float(particle.loss) for particle in self._particles(student, teacher, args, kwargs))

    def loss_and_grads(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; adds its gradient to the ``grad`` of the student's parameters."""
        total, params = 0.0, dict[str, Tensor]()
        try:
            for particle in self._particles(student, teacher, args, kwargs):
                params |= particle.params()
                if is_capturing_params() and self._seen.captured != (student, teacher):
                    again = partial(self._reached_again, student, teacher, args, kwargs)
                    check_params_are_captured(particle.loss, params, (args, kwargs), again)
                    self._seen.captured = (student, teacher)
                particle.loss.backward(retain_graph=self.retain_graph)
                check_finite_gradients(params)
                total += float(particle.loss.detach())
        except BaseException:
            for param in params.values():  # whatever the particles before this one have left
                param.grad = None
            raise
        return total

    def differentiable_loss(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a scalar tensor, differentiable with respect to the student's parameters."""
        needs_params = self._compile_options is not None or not is_frozen(teacher)
        with nullcontext() if needs_params else self._seen.registered.skipped():
            losses = [particle.loss for particle in self._particles(student, teacher, args, kwargs)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def terms(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> SiteTerms:
        """The loss taken apart by site, in the teacher's execution order; also of sites with weight 0 that can be compared.

        The loss is the sum of ``term.weight * term.value``. The dictionary is shown as a table.
        """
        sums = SiteTerms()
        for run in self._runs(student, teacher, args, kwargs):
            for term in self._run_terms(run, report=True):
                if term.name in sums:
                    term = term._replace(value=sums[term.name].value + term.value)
                sums[term.name] = term
        check_finite_terms(sums.values())
        return sums

    # The flow.

    def _particles(self, student: Program, teacher: Program, args: Any, kwargs: Any) -> Iterator[_Particle]:
        """For each run of the programs, its share of the loss."""
        count = 1 if self.vectorize_particles else self.num_particles
        if self._compile_options is None:
            runs = self._runs(student, teacher, args, kwargs)
            for _ in range(count):
                with self._seen.validation.of_call(student, teacher, args, kwargs):
                    particle = self._next_particle(runs)
                if torch.is_grad_enabled() and self._seen.learning != (student, teacher):
                    self._check_reached([particle.loss], particle.params(), student, teacher, args, kwargs)
                yield particle
            return
        _require_programs(student, teacher)
        captured = self._capture_of(student, teacher)
        for _ in range(count):
            outputs = captured(args, kwargs, self.latent_weight)
            if outputs is None:
                yield self._next_particle(self._runs(student, teacher, args, kwargs))
            else:
                yield _Particle(outputs.loss, captured.params)

    def _next_particle(self, runs: Iterator[PairedRun]) -> _Particle:
        return self._particle(next(runs)._replace(noise=NoiseRecord()))  # frees the noise, which nothing below needs

    def _particle(self, run: PairedRun) -> _Particle:
        terms = self._checked_terms(run)
        loss = torch.stack([term.value if term.weight == 1 else term.weight * term.value for term in terms]).sum()
        if not READERS:  # a captured loss is looked at when the graph has run
            check_parameters(run.student)
            if not math.isfinite(loss.item()):
                check_finite_terms(terms)
        return _Particle(loss, partial(params_of, run.student))

    def _check_reached(
        self, values: Iterable[Tensor], params: Any, student: Program, teacher: Program, args: Any, kwargs: Any
    ) -> None:
        """Once per pair of programs: whether what is differentiated are the student's parameters."""
        again = partial(self._reached_again, student, teacher, args, kwargs)
        check_parameters_are_reached(values, params, student, (args, kwargs), again)
        self._seen.learning = (student, teacher)

    def _again(self, student: Program, teacher: Program, args: Any, kwargs: Any) -> list[SiteTerm]:
        """The terms of one more run, which has no effect."""
        with without_effect(student):
            return self._run_terms(next(self._runs(student, teacher, args, kwargs)))

    def _reached_again(self, student: Program, teacher: Program, args: Any, kwargs: Any) -> set[Tensor]:
        return leaves_of([term.value for term in self._again(student, teacher, args, kwargs)])

    def _capture_of(self, student: Program, teacher: Program) -> CapturedLoss:
        """The graphs of a pair of programs; those of the last few pairs are kept."""
        for pair, found in self._captured:
            if pair == (student, teacher):
                return found

        def evaluate(args: Any, kwargs: Any) -> tuple[list[SiteTerm], Trace]:
            run = next(self._runs(student, teacher, args, kwargs))
            terms = self._checked_terms(run)
            if torch.is_grad_enabled() and self._seen.learning != (student, teacher):
                values = [term.value for term in terms]
                self._check_reached(values, params_of(run.student), student, teacher, args, kwargs)
            return terms, run.student

        captured = CapturedLoss(evaluate, (student, teacher), self, self._compile_options or {})
        self._captured = [*self._captured[1 - _MAX_PAIRS :], ((student, teacher), captured)]
        return captured

    def _runs(self, student: Program, teacher: Program, args: Any, kwargs: Any) -> Iterator[PairedRun]:
        if (student, teacher) not in self._seen.modes:
            _require_programs(student, teacher)
            self._seen.modes = [*self._seen.modes[1 - _MAX_PAIRS :], (student, teacher)]
            warn_of_modes(student, teacher, partial(self._again, student, teacher, args, kwargs))
        return self._get_traces(student, teacher, args, kwargs)

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> PairedRun:
        """Run the teacher, then the student on its noise and the values it is given."""
        self._seen.between.meet(model, guide)
        with hint_at_swapped(model):
            run = self._pair(model, guide, args, kwargs)
            if not is_frozen(guide):
                check_no_shared_parameters(run.student, run.teacher, model, guide)
            if torch.is_grad_enabled():
                run = run._replace(teacher_params=self._params_of_teacher(run, model, guide, args, kwargs))
        return run

    def _pair(self, model: Program, guide: Program, args: Any, kwargs: Any) -> PairedRun:
        taught = self._run_teacher(guide, args, kwargs)
        require_targets(taught.finder.names, taught.sites, self.targets)
        looks = self._seen.between.looks or bool(READERS)
        replay = CollectingReplayMessenger(taught.noise, self.site_map, self.fresh, looks_between=looks)
        give = taught.giver(self._compared_of_given(taught.sites, taught.finder.names), self.site_map, replay)
        before = states() if self._seen.between.watches_student and not looks else []
        with self._autograd(model):
            student = run_student(model, taught, replay, give, args, kwargs)
        if looks:
            self._seen.between.note(taught.noise, replay.between)
        elif before and have_moved(before):
            self._seen.between.alarm()
        pairs, error = pair_up(taught, student, replay, give, self.site_map, self.fresh)
        if error is not None:
            raise error
        check_inputs(taught, student, give, self.site_map, self.fresh, (args, kwargs))
        for pair in pairs:
            if self._weight(pair) != 0:
                check_same_weighting(pair)
                self._check_comparable(pair)
        if not self._seen.knows_factors:
            warn_of_factors(student, taught.trace)
            self._seen.knows_factors = True
        between = [*taught.noise.lost_between, *replay.between]
        return PairedRun(pairs, student, taught.trace, taught.noise, set(), partial(guarded, guide, pairs), between)

    def _compared_of_given(self, p_sites: Mapping[str, Any], targets: Collection[str]) -> list[str]:
        """The sites to be given: of those that the kind of loss gives, targets, and latents whose law is compared."""
        return [
            name
            for name in self.given_sites(p_sites, targets)
            if name in targets
            or (compared_elements(p_sites[name]) is not False and weight_of(name, self.latent_weight) != 0)
        ]

    def _autograd(self, student: Program) -> AbstractContextManager[Any]:
        """Turn gradients on for a student that differentiates inside."""
        if torch.is_grad_enabled():
            return nullcontext()
        if self._seen.differentiates is None or self._seen.differentiates[0] != student:
            self._seen.differentiates = student, Reached(student).differentiates
        return torch.enable_grad() if self._seen.differentiates[1] else nullcontext()

    def _run_teacher(self, teacher: Program, args: Any, kwargs: Any) -> Taught:
        if not self._seen.between.looks and not READERS:
            with StreamWatch() as watch:
                taught = record_teacher(teacher, self.targets, args, kwargs, watch)
            if not watch.moved:
                return taught
            self._seen.between.looks = True
        return record_teacher(teacher, self.targets, args, kwargs)

    def _params_of_teacher(self, run: PairedRun, student: Program, teacher: Program, args: Any, kwargs: Any) -> set[Tensor]:
        """The parameters that the teacher's distributions depend on, and may hold themselves.

        Those of this run's ``pyro.param`` statements, and those that the program reaches otherwise. For the latter, once per
        pair of programs and set of sites, the teacher runs on its own noise again, now with gradients. A frozen teacher has
        none, unless it reached something that could not be copied.
        """
        sites = tuple(name for name, site in run.teacher.nodes.items() if site["type"] == "sample")
        key = (unwrap(student), unwrap(teacher), sites)
        if self._seen.programs != key:
            targets = {pair.name: pair.value for pair in run.pairs if pair.is_target}
            frozen = unwrap(teacher)
            with (
                frozen.traced() if isinstance(frozen, FrozenProgram) else evaluation_mode(teacher),
                torch.enable_grad(),
                poutine.block(hide_types=["param"]),
                ReplayNoiseMessenger(run.noise),
            ):
                trace = get_trace(poutine.condition(teacher, targets), args, kwargs)
                reached = leaves_of_densities(trace)
            self._seen.reached = reached - leaves_of(tensors_in((args, kwargs)))
            with without_effect(student):  # a density may move averages, as a flow with batch norm does
                check_no_shared_leaves(run.student, self._seen.reached, student, teacher)
            self._seen.programs = key
        if is_frozen(teacher):
            return self._seen.reached
        return (
            self._seen.reached
            | set(params_of(run.teacher).values())
            | {t for pair in run.pairs for t in leaves_held_by(pair.p)}
        )

    def _checked_terms(self, run: PairedRun) -> list[SiteTerm]:
        """The terms of a run, which depend on something that is trained."""
        terms = self._run_terms(run)
        if torch.is_grad_enabled():
            check_student_learns(terms)
        return terms

    def _run_terms(self, run: PairedRun, *, report: bool = False) -> list[SiteTerm]:
        weights = {pair.name: self._weight(pair) for pair in run.pairs}
        # A teacher's distribution may hold one of its parameters itself, which no_grad does not detach.
        with without_grad(run.teacher_params), run.guard():
            weighted = [self._wanted(pair) for pair in run.pairs if weights[pair.name] != 0]
            found = {item.pair.name: (item, value) for item, value in zip(weighted, totals(weighted), strict=True)}
            for pair in run.pairs if report else ():
                if weights[pair.name] == 0 and self._is_comparable(pair):
                    with suppress(UnsupportedDivergenceError):
                        item = self._wanted(pair)
                        found[pair.name] = item, totals([item])[0]
        return [self._term(*found[pair.name], weights[pair.name], report) for pair in run.pairs if pair.name in found]

    def _wanted(self, pair: SitePair) -> Wanted:
        is_mean = self.latent_reduction == "mean" and not pair.is_target
        size = max(getattr(pair.p, "event_shape", torch.Size()).numel(), 1) if is_mean else 1
        return Wanted(pair, self._divergence(pair), self.num_particles * size)

    def _term(self, item: Wanted, value: Tensor, weight: float, report: bool) -> SiteTerm:
        pair = item.pair
        analytic = item.divergence.is_exact(pair.p, pair.q) if report else None
        kind = "target" if pair.is_target else "latent"
        return SiteTerm(pair.name, kind, value, weight, item.divergence.name, analytic)

    def _check_comparable(self, pair: SitePair) -> None:
        is_vectorized = self.vectorize_particles and self.num_particles > 1
        if (pair.signature, is_vectorized) not in self._seen.signatures:
            check_comparable(pair, needs_support=self._divergence(pair).needs_support, is_vectorized=is_vectorized)
            self._seen.signatures.add((pair.signature, is_vectorized))

    def _is_comparable(self, pair: SitePair) -> bool:
        try:
            check_same_weighting(pair)
            self._check_comparable(pair)
        except PyroKDError:
            return False
        return True

    def _divergence(self, pair: SitePair) -> Divergence:
        divergence = self.divergence if pair.is_target else self.latent_divergence
        return Divergence.of(divergence).at(pair.p, pair.q)

    def _weight(self, pair: SitePair) -> float:
        return 1.0 if pair.is_target else weight_of(pair.name, self.latent_weight)

    def _guess_max_plate_nesting(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        """Pyro's guess, from one run of the pair that leaves the student as it was."""
        with poutine.block(), evaluation_mode(model, guide):
            run = self._get_trace(model, guide, args, kwargs)
        dims: list[Any] = [
            frame.dim
            for trace in (run.student, run.teacher)
            for site in trace.nodes.values()
            if site["type"] == "sample"
            for frame in site["cond_indep_stack"]
            if frame.vectorized
        ]
        self.max_plate_nesting = -min(dims, default=0) + (self.num_particles > 1)


def _shown(option: Any) -> str:
    """An option of a loss as text: a function by its name."""
    return getattr(option, "__qualname__", repr(option)).replace("<locals>.", "")


def _require_programs(student: Any, teacher: Any) -> None:
    require_callable(student, "the student (first argument)")
    require_callable(teacher, "the teacher (second argument)")
