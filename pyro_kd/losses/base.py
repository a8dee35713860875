r"""What every distillation loss shares: its options, the interface of Pyro's ELBO, and the sum over particles.

    student, teacher --run_pair--> PairedRun --terms_of--> SiteTerm per site --combine--> one scalar

A new loss is a subclass that overrides one of two methods. :meth:`DistillationLoss.given_sites` says which of the teacher's
values the student is given; the rest is a function of the shared noise. :class:`~pyro_kd.losses.surrogate.SurrogateKD` gives
the targets, :class:`~pyro_kd.losses.local.LocalKD` everything. :meth:`DistillationLoss.combine` makes one number of the particles.
Both are called wherever the loss is: in SVI, in training loops, in compiled graphs and in reports.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_kd.divergences import DivergenceFunction, kl
from pyro_kd.errors import NonFiniteLossError
from pyro_kd.isolation.effects import without_effect
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.losses.captured import CapturedLoss
from pyro_kd.losses.constraints import check_parameters
from pyro_kd.losses.finite import check_finite_gradients, check_finite_terms
from pyro_kd.losses.learning import (
    check_parameters_are_reached,
    check_params_are_captured,
    check_student_learns,
    is_capturing_params,
)
from pyro_kd.losses.mode_warning import warn_of_modes
from pyro_kd.losses.module import DistillationModule
from pyro_kd.losses.ownership import teacher_leaves
from pyro_kd.losses.paired_run import PairedRun, record_teacher, run_pair
from pyro_kd.losses.program_pair import Program, ProgramPair, ProgramPairs
from pyro_kd.losses.targets import Targets, Weight, weight_of
from pyro_kd.losses.terms import SiteTerm, SiteTerms, mean_terms, terms_of
from pyro_kd.noise.record import NoiseRecord
from pyro_kd.sites.observed import warn_of_factors
from pyro_kd.sites.tracing import params_of
from pyro_kd.sites.weighting import compared_elements
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.display import as_html

__all__ = ["DistillationLoss", "Particle"]


class Particle(NamedTuple):
    """One sample of the noise, and what the loss is made of on it.

    Attributes:
        run: both programs on that noise: pairs of sites with their distributions and values.
        terms: one per site that counts, in the teacher's execution order. With ``vectorize_particles`` there is one particle,
            whose terms are means over the outer plate.
    """

    run: PairedRun
    terms: list[SiteTerm]


class _Share(NamedTuple):
    """A part of the loss, and the student's parameters in Pyro's store that it may depend on, by name."""

    loss: Tensor
    params: Callable[[], dict[str, Tensor]]


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
        self._pairs = ProgramPairs()
        self._compile_options: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying: without what was learned of the programs."""
        return vars(self) | {"_pairs": ProgramPairs()}

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
        """From now on, run the programs' handlers once per signature of the arguments, and a compiled graph after that.

        For ``SVI(student, teacher, optim, SurrogateKD(["x"]).compile())``; a loop in plain PyTorch calls ``compile()`` of the bound
        module. See docs/performance.md for what is captured, and when that pays.

        Args:
            **options: ``max_graphs``, how many signatures get a graph of their own (8); and those of ``torch.compile``:
                ``backend``, ``mode``, ``options``. With ``backend=None`` the graph runs as it is: ready in
                seconds, and without the handlers' cost.

        Returns:
            The loss itself.
        """
        self._compile_options = options
        self._pairs = ProgramPairs()
        return self

    @abstractmethod
    def given_sites(self, teacher: Mapping[str, Any], targets: Collection[str]) -> Collection[str]:
        """Names of the teacher's sites whose values the student is conditioned on.

        What is compared nowhere is not given all the same: latents of weight 0, and elements that a mask or a scale of 0 removes.

        Args:
            teacher: the teacher's sample sites in execution order: name -> Pyro's site dictionary.
            targets: names of the target sites among them.
        """

    def combine(self, particles: Sequence[Particle]) -> Tensor:
        """The loss as a function of the particles: by default the mean of their weighted sums of terms.

        Override it for an objective that is no mean over particles, such as a bound of several samples. It is then called with all
        particles at once, wherever the loss is evaluated. Use tensor operations on ``particle.terms`` or on ``particle.run.pairs``,
        whose distributions ``p`` (teacher) and ``q`` (student) have the batch shape of the site.

        Args:
            particles: ``num_particles`` of them; one, with means over an outer plate, where particles are vectorized.

        Returns:
            A scalar tensor.
        """
        sums = [torch.stack([_weighted(term) for term in particle.terms]).sum() for particle in particles]
        return sums[0] if len(sums) == 1 else torch.stack(sums).mean()

    # The interface of Pyro's ELBO: model is the student, guide the teacher.

    def __call__(self, student: Program, teacher: Program) -> DistillationModule:  # type: ignore[override]
        """Bind the loss to two programs: an ``nn.Module`` whose call returns the differentiable loss."""
        self._pairs.of(student, teacher)
        return DistillationModule(self, student, teacher)

    def loss(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without gradients."""
        known = self._pairs.of(student, teacher)
        with torch.no_grad():
            return sum(float(share.loss) for share in self._shares(known, args, kwargs))

    def loss_and_grads(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; adds its gradient to the ``grad`` of the student's parameters."""
        known = self._pairs.of(student, teacher)
        total, params = 0.0, dict[str, Tensor]()
        try:
            for share in self._shares(known, args, kwargs):
                params |= share.params()
                if is_capturing_params() and not known.is_seen_by_svi:
                    again = partial(self._leaves_of_new_run, known, args, kwargs)
                    check_params_are_captured(share.loss, params, (args, kwargs), again)
                    known.is_seen_by_svi = True
                share.loss.backward(retain_graph=self.retain_graph)
                check_finite_gradients(params)
                total += float(share.loss.detach())
        except BaseException:
            for param in params.values():  # whatever the particles before this one have left
                param.grad = None
            raise
        return total

    def differentiable_loss(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a scalar tensor, differentiable with respect to the student's parameters."""
        losses = [share.loss for share in self._shares(self._pairs.of(student, teacher), args, kwargs)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def terms(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> SiteTerms:
        """The terms of the loss by site, in the teacher's execution order, and the loss itself as ``terms.loss``.

        Values are means over particles. Sites of weight 0 that can be compared have a term too. By default the loss is the sum
        of ``term.weight * term.value``. The dictionary is shown as a table.
        """
        known = self._pairs.of(student, teacher)
        particles = self._particles(known, args, kwargs, report=True)
        means = mean_terms([particle.terms for particle in particles])
        check_finite_terms(means.values())
        means.loss = self._reported(particles)
        return means

    def particles(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> list[Particle]:
        """The particles of one call: the runs of both programs, and their terms. Sites of weight 0 are among these."""
        return self._particles(self._pairs.of(student, teacher), args, kwargs, report=True)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("a distillation loss runs its programs by run_pair")  # where Pyro's ELBO calls this

    # The flow: runs, terms, one scalar.

    def _shares(self, known: ProgramPair, args: Any, kwargs: Any) -> Iterator[_Share]:
        """The loss in shares that add up to it: one per particle where these are averaged, so that one is in memory at a time."""
        count = 1 if self.vectorize_particles else self.num_particles
        num_shares = 1 if self._combines_particles else count
        for _ in range(num_shares):
            share = self._share(known, args, kwargs, count // num_shares)
            yield share if num_shares == 1 else share._replace(loss=share.loss / num_shares)

    def _share(self, known: ProgramPair, args: Any, kwargs: Any, count: int) -> _Share:
        if self._compile_options is not None:
            if known.captured is None:
                evaluate = partial(self._evaluate, known, count=count)
                known.captured = CapturedLoss(evaluate, (known.student, known.teacher), self, self._compile_options)
            outputs = known.captured(args, kwargs, self.latent_weight)
            if outputs is not None:
                return _Share(outputs.loss, known.captured.params)
        with known.validation.of_call(args, kwargs):
            particles, loss = self._evaluate(known, args, kwargs, count)
            for particle in particles:
                check_parameters(particle.run.student)
        _check_finite(loss, particles)
        return _Share(loss, partial(_params_of, [particle.run.student for particle in particles]))

    def _evaluate(
        self,
        known: ProgramPair,
        args: Any,
        kwargs: Any,
        count: int,
        weigh: Callable[[SiteTerm], SiteTerm] | None = None,
    ) -> tuple[list[Particle], Tensor]:
        """Particles, and the loss of them.

        Args:
            known: the two programs.
            args, kwargs: their arguments.
            count: number of particles.
            weigh: gives the terms different weights, such as inputs of a graph.
        """
        particles = [self._particle(known, args, kwargs) for _ in range(count)]
        if weigh is not None:
            particles = [Particle(run, [weigh(term) for term in terms]) for run, terms in particles]
        loss = self._combined(particles)
        if torch.is_grad_enabled():
            check_student_learns(loss)
            if not known.is_learning:
                self._check_learning(loss, particles, known, args, kwargs)
        return particles, loss

    def _combined(self, particles: list[Particle]) -> Tensor:
        if not self._combines_particles:
            return self.combine(particles)
        with ExitStack() as stack:
            for particle in particles:
                stack.enter_context(particle.run.evaluating())
            loss = self.combine(particles)
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                f"{type(self).__name__}.combine must return a scalar tensor, not {shape}: take the sum or the mean"
            )
        return loss

    def _reported(self, particles: list[Particle]) -> Tensor:
        """The loss of particles that have terms of weight 0 as well."""
        return self._combined([Particle(run, [term for term in terms if term.weight != 0]) for run, terms in particles])

    @property
    def _combines_particles(self) -> bool:
        """Whether a subclass makes something of all particles at once."""
        return type(self).combine is not DistillationLoss.combine

    def _particles(self, known: ProgramPair, args: Any, kwargs: Any, *, report: bool) -> list[Particle]:
        count = 1 if self.vectorize_particles else self.num_particles
        return [self._particle(known, args, kwargs, report=report) for _ in range(count)]

    def _particle(
        self,
        known: ProgramPair,
        args: Any,
        kwargs: Any,
        *,
        report: bool = False,
        student: Program | None = None,
        record: Callable[..., Any] = record_teacher,
    ) -> Particle:
        """Run the pair once, and compare its sites.

        Args:
            known: the two programs.
            args, kwargs: their arguments.
            report: whether to keep the noise of the run, and to compare sites of weight 0.
            student: the student in a handler of the caller's.
            record: runs the teacher, see :func:`~pyro_kd.losses.paired_run.run_pair`.
        """
        if not known.has_agreeing_modes:
            known.has_agreeing_modes = True
            warn_of_modes(known.student, known.teacher, partial(self._terms_of_new_run, known, args, kwargs))
        student, teacher = known.student if student is None else student, known.teacher
        if self.vectorize_particles and self.num_particles > 1:
            if math.isinf(self.max_plate_nesting):
                self._guess_max_plate_nesting(student, teacher, args, kwargs)
            student, teacher = self._in_particle_plate(student), self._in_particle_plate(teacher)
        options: dict[str, Any] = {"targets": self.targets, "site_map": self.site_map, "fresh": self.fresh}
        run = run_pair(
            student, teacher, args, kwargs, given_sites=self._given_and_compared, record=record, known=known, **options
        )
        if not known.has_known_factors:
            warn_of_factors(run.student, run.teacher)
            known.has_known_factors = True
        if torch.is_grad_enabled():
            run.teacher_leaves = teacher_leaves(run, known, teacher, args, kwargs)
        if not report:
            run.noise = NoiseRecord()  # frees it: nothing below needs it
        return Particle(run, self._terms_of(run, known, report=report))

    def _terms_of(self, run: PairedRun, known: ProgramPair, *, report: bool = False) -> list[SiteTerm]:
        return terms_of(
            run,
            divergence=self.divergence,
            latent_divergence=self.latent_divergence,
            latent_weight=self.latent_weight,
            latent_reduction=self.latent_reduction,
            num_vectorized=self.num_particles if self.vectorize_particles else 1,
            report=report,
            comparable=known.comparable,
        )

    def _given_and_compared(self, sites: Mapping[str, Any], targets: Collection[str]) -> list[str]:
        """The sites to be given: of those that the loss gives, targets, and latents whose distribution is compared."""
        return [
            name
            for name in self.given_sites(sites, targets)
            if name in targets or (compared_elements(sites[name]) is not False and weight_of(name, self.latent_weight) != 0)
        ]

    def _in_particle_plate(self, program: Program) -> Program:
        wrapped: Program = pyro.plate("num_particles_vectorized", self.num_particles, dim=-int(self.max_plate_nesting))(
            program
        )
        return wrapped

    def _guess_max_plate_nesting(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        """Pyro's guess, from one run of the pair that leaves the student as it was."""
        options: dict[str, Any] = {"targets": self.targets, "site_map": self.site_map, "fresh": self.fresh}
        with poutine.block(), evaluation_mode(model, guide):
            run = run_pair(model, guide, args, kwargs, given_sites=self._given_and_compared, **options)
        dims: list[Any] = [
            frame.dim
            for trace in (run.student, run.teacher)
            for site in trace.nodes.values()
            if site["type"] == "sample"
            for frame in site["cond_indep_stack"]
            if frame.vectorized
        ]
        self.max_plate_nesting = -min(dims, default=0) + (self.num_particles > 1)

    # What is checked once per pair of programs.

    def _check_learning(
        self, loss: Tensor, particles: Sequence[Particle], known: ProgramPair, args: Any, kwargs: Any
    ) -> None:
        """Whether what the loss is differentiated by are the student's parameters."""
        again = partial(self._leaves_of_new_run, known, args, kwargs)
        params = _params_of([particle.run.student for particle in particles])
        check_parameters_are_reached([loss], params, known.student, (args, kwargs), again)
        known.is_learning = True

    def _terms_of_new_run(self, known: ProgramPair, args: Any, kwargs: Any) -> list[SiteTerm]:
        """The terms of one more run, which has no effect."""
        with without_effect(known.student):
            return self._particle(known, args, kwargs).terms

    def _leaves_of_new_run(self, known: ProgramPair, args: Any, kwargs: Any) -> set[Tensor]:
        with without_effect(known.student):
            return leaves_of([self._combined(self._particles(known, args, kwargs, report=False))])


def _weighted(term: SiteTerm) -> Tensor:
    return term.value if type(term.weight) is float and term.weight == 1 else term.weight * term.value


def _check_finite(loss: Tensor, particles: Iterable[Particle]) -> None:
    """Raise NonFiniteLossError where a loss is NaN or infinite; it names the first site that is."""
    value = loss.item()
    if not math.isfinite(value):
        for particle in particles:
            check_finite_terms(particle.terms)
        raise NonFiniteLossError(
            f"the loss is {value}, although the term of each site is finite: check combine() or latent_weight."
        )


def _params_of(students: Iterable[Any]) -> dict[str, Tensor]:
    """The parameters of the runs of a student that Pyro knows, by name."""
    return {name: param for trace in students for name, param in params_of(trace).items()}


def _shown(option: Any) -> str:
    """An option of a loss as text: a function by its name."""
    return getattr(option, "__qualname__", repr(option)).replace("<locals>.", "")
