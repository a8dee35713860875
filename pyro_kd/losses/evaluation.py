"""One evaluation of a loss between a student and a teacher, from their runs to one scalar.

    run_pair --> PairedRun --> terms_of --> SiteTerm per site --> Particle --> DistillationLoss.combine --> a share of the loss

A share is evaluated eagerly, by running both programs in their handlers, or by a captured graph of the same computation.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any
from warnings import catch_warnings, simplefilter

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_kd.isolation.effects import without_effect
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.losses.advising import with_advice
from pyro_kd.losses.captured import CapturedLoss
from pyro_kd.losses.constraints import check_parameters
from pyro_kd.losses.discrete_gradients.choice import DiscreteGradients
from pyro_kd.losses.discrete_gradients.rerun import Rerun
from pyro_kd.losses.discrete_gradients.surrogate import NEEDS_ROWS, RERUNS, with_discrete_gradients
from pyro_kd.losses.draw_source import DrawSource
from pyro_kd.losses.finite import check_finite_loss, check_finite_terms
from pyro_kd.losses.first_run import look_at_first_run
from pyro_kd.losses.forcing import Chance, Given
from pyro_kd.losses.given_values import given_values, latents_of, recorder
from pyro_kd.losses.interface import Loss, Particle, terms_in
from pyro_kd.losses.learning import check_parameters_are_reached, check_params_are_captured, check_student_learns
from pyro_kd.losses.left_out import check_left_out
from pyro_kd.losses.mode_warning import warn_of_modes
from pyro_kd.losses.paired_run import PairedRun, hinting_at_swapped
from pyro_kd.losses.program_pair import Program, ProgramPair
from pyro_kd.losses.shares import Share, params_of_students
from pyro_kd.losses.teacher_draws import StoredTeacher, call_of, check_stored, draw_in
from pyro_kd.losses.terms import SiteTerm, SiteTerms, mean_terms
from pyro_kd.noise.record import NoiseRecord
from pyro_kd.sites.classification import compared_sites
from pyro_kd.utils.autocast import full_precision
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.randomness import keeping_random_state
from pyro_kd.utils.user_code import called

__all__ = ["Evaluator", "Particle", "check_finite_loss"]


class Evaluator:
    """Evaluates a loss between two programs.

    Args:
        loss: the loss, which has the options and combines the particles.
        pair: the two programs, with what is known about them.
    """

    def __init__(self, loss: Loss, pair: ProgramPair) -> None:
        self.loss = loss
        self.pair = pair
        self._kept = DiscreteGradients(loss.discrete_gradient, loss.site_map)

    @property
    def _gradients(self) -> DiscreteGradients:
        loss = self.loss  # a captured loss outlives a change of its options
        if self._kept.option is not loss.discrete_gradient or self._kept.site_map is not loss.site_map:
            self._kept = DiscreteGradients(loss.discrete_gradient, loss.site_map)
        return self._kept

    def shares(self, args: Any, kwargs: Any) -> Iterator[Share]:
        """The loss in shares that add up to it.

        Where particles are averaged, there is one share per particle, so that only one particle is in memory at a time.
        """
        source = self._source
        self.check_draws(args)
        for _ in range(self._num_shares):
            self.look_at_latents(args, kwargs)
            yield self._share(*source.drawn(args, kwargs), source)

    @property
    def _source(self) -> DrawSource:
        return DrawSource(
            self.loss,
            self.pair,
            self._programs,
            self._run,
            num_runs=self._particles_per_share,
            is_rerun=partial(self._gradients.may_be, *RERUNS),
        )

    @with_advice
    def _share(self, args: Any, kwargs: Any, source: DrawSource) -> Share:
        options = self.loss.compile_options
        if options is None or not source.check_captured():
            return self._eager_share(args, kwargs)
        if self.pair.captured is None:
            programs = self.pair.student, self.pair.teacher
            self.pair.captured = CapturedLoss(self._evaluate, self._eager_share, programs, self.loss, options)
        share: Share = self.pair.captured(args, kwargs)
        return share

    def _eager_share(self, args: Any, kwargs: Any) -> Share:
        with self.pair.validation.of_call(*call_of(args, kwargs)):
            particles, loss = self._evaluate(args, kwargs)
            for particle in particles:
                check_parameters(particle.run.student)
        check_finite_loss(loss, terms_in(particles))
        students, terms = [particle.run.student for particle in particles], [particle.terms for particle in particles]
        return Share(loss, partial(params_of_students, students), lambda: terms)

    @full_precision()
    def _evaluate(
        self,
        args: Any,
        kwargs: Any,
        weigh: Callable[[SiteTerm], SiteTerm] | None = None,
        chances: Mapping[str, Callable[[str], Chance]] | None = None,
    ) -> tuple[list[Particle], Tensor]:
        """The particles of one share, and their loss.

        Args:
            args, kwargs: arguments of both programs.
            weigh: replaces the weights of terms, such as by inputs of a graph.
            chances: replaces probabilities likewise, see :meth:`particle`.
        """
        draw, given = draw_in(args), (args, kwargs)
        record = None if draw is None else draw.replay()
        args, kwargs = call_of(args, kwargs)
        particles = [self.particle(args, kwargs, record=record, chances=chances) for _ in range(self._particles_per_share)]
        if weigh is not None:
            particles = [Particle(run, [weigh(term) for term in terms]) for run, terms in particles]
        num_shares, loss = self._num_shares, self.trained(particles, args, kwargs)
        loss = loss if num_shares == 1 else loss / num_shares
        if torch.is_grad_enabled():
            check_student_learns(loss)
            if not self.pair.is_learning:
                self.check_learning(loss, particles, *given)
        return particles, loss

    @with_advice
    def trained(self, particles: list[Particle], args: Any, kwargs: Any) -> Tensor:
        """The loss of particles, with the gradients through discrete latents."""
        loss = self.combined(particles)
        if not torch.is_grad_enabled():
            return loss
        return with_discrete_gradients(loss, particles, self._gradients, self.loss, partial(self._rerun, args, kwargs))

    def combined(self, particles: list[Particle]) -> Tensor:
        """The loss of particles, checked to be a scalar tensor."""
        if not self.loss.combines_particles:
            return self._combine(particles)
        with ExitStack() as stack:
            for particle in particles:
                stack.enter_context(particle.run.evaluating())
            loss = self._combine(particles)
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                f"{type(self.loss).__name__}.combine must return a scalar tensor, not {shape}: take the sum or the mean"
            )
        return loss

    def _combine(self, particles: list[Particle]) -> Tensor:
        return called(self.loss.combine, f"{type(self.loss).__name__}.combine", "combine(particles)", particles)

    def reported(self, particles: list[Particle], args: Any, kwargs: Any) -> Tensor:
        """The loss of particles that also have terms of weight 0, which are left out; with the gradients of a step."""
        particles = [Particle(run, [term for term in terms if term.weight != 0]) for run, terms in particles]
        return self.trained(particles, *call_of(args, kwargs))

    @with_advice
    @full_precision()
    def terms(self, args: Any, kwargs: Any) -> SiteTerms:
        """The terms of all particles, averaged by site, with the loss. One particle is in memory at a time, if they are averaged."""
        self.check_draws(args)
        self.look_at_latents(args, kwargs)
        losses, terms = [], []
        for _ in range(self._num_shares):
            particles = [self.particle(args, kwargs, report=True) for _ in range(self._particles_per_share)]
            losses.append(self.reported(particles, args, kwargs))
            terms += [particle.terms for particle in particles]
        means = mean_terms(terms)
        check_finite_terms(means.values())
        means.loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        means.is_weighted_sum = not self.loss.combines_particles
        return means

    @full_precision()
    def particles(self, args: Any, kwargs: Any, *, report: bool, keep_noise: bool = False) -> list[Particle]:
        """All particles of one evaluation; see :meth:`particle`."""
        self.check_draws(args)
        self.look_at_latents(args, kwargs)
        return [self.particle(args, kwargs, report=report, keep_noise=keep_noise) for _ in range(self._num_particles)]

    @property
    def _num_shares(self) -> int:
        """Into how many parts the loss is divided: one per particle, unless these are vectorized or combined."""
        return self._num_particles // self._particles_per_share

    @property
    def _particles_per_share(self) -> int:
        needs_all = self.loss.combines_particles or self._gradients.may_be("score")
        return self._num_particles if needs_all else 1

    @property
    def _num_particles(self) -> int:
        return 1 if self.loss.vectorize_particles else self.loss.num_particles

    @with_advice
    def particle(
        self,
        args: Any,
        kwargs: Any,
        *,
        report: bool = False,
        keep_noise: bool = False,
        student: Program | None = None,
        record: Callable[..., Any] | None = None,
        chances: Mapping[str, Callable[[str], Chance]] | None = None,
    ) -> Particle:
        """Run the pair once, and compare its sites.

        Args:
            args, kwargs: arguments of both programs, or a draw of the teacher.
            report: whether to compare sites of weight 0 too.
            keep_noise: whether the run keeps its noise, which a loss no longer needs.
            student: a version of the student to run instead, such as the student in a handler.
            record: runs the teacher, see :func:`~pyro_kd.losses.paired_run.run_pair`.
            chances: functions of the site's name that replace the loss's options ``teacher_forcing`` and ``student_fraction``.
        """
        draw, given = draw_in(args), (args, kwargs)
        if draw is not None:
            (args, kwargs), record = draw.call, draw.replay()
        if not self.pair.has_agreeing_modes:
            self.pair.has_agreeing_modes = True
            drawn = cache(partial(self._source.drawn_aside, *given))
            warn_of_modes(self.pair.student, self.pair.teacher, lambda: self.terms_of_new_run(*drawn()))
        own, teacher = self._programs(args, kwargs, student)
        is_trained = torch.is_grad_enabled() and self._gradients.option != "cut"
        self.pair.keeps_target_noise = is_trained and self._gradients.may_be(*RERUNS)
        run = self._run(
            own,
            teacher,
            args,
            kwargs,
            given_sites=partial(self.given, chance_of=(chances or {}).get("teacher_forcing")),
            record=record or recorder(self.loss, own, (chances or {}).get("student_fraction")),
            gradients=self._gradients if is_trained else None,
        )
        if not self.pair.has_checked_factors:
            self.pair.has_checked_factors = True
            loss, told = self.loss, self.pair.told
            look_at_first_run(run, loss.site_map, told, compares_conditionals=loss.compares_conditionals)
            fresh = list(compared_sites(run.student)) if "*" in self.loss.fresh else sorted(self.loss.fresh)
            self._gradients.check_names([pair.name for pair in run.pairs if not pair.is_target] + fresh)
        if torch.is_grad_enabled() and not self.pair.has_checked_points:
            self.pair.has_checked_points = True
            check_left_out(run, self.loss.site_map, self.loss.fresh)
        if not keep_noise and not (is_trained and self._gradients.may_be(*NEEDS_ROWS)):
            run.noise, run.drawn = NoiseRecord(), {}  # frees it: nothing below needs it
        with hinting_at_swapped(self.pair.student):
            return Particle(run, self.terms_of(run, report=report))

    def _programs(self, args: Any, kwargs: Any, student: Program | None = None) -> tuple[Program, Program]:
        """Student and teacher in the form in which they run: in an outer plate where particles are vectorized."""
        student, teacher = self.pair.student if student is None else student, self.pair.teacher
        if not (self.loss.vectorize_particles and self.loss.num_particles > 1):
            return student, teacher
        if math.isinf(self.loss.max_plate_nesting):
            self.guess_plate_nesting(args, kwargs)
        return self._in_particle_plate(student), self._in_particle_plate(teacher)

    def _run(self, student: Program, teacher: Program, args: Any, kwargs: Any, **options: Any) -> PairedRun:
        options = {"given_sites": self.given, "known": self.pair, **self._options, **options}
        return self.loss.run_programs(student, teacher, args, kwargs, **options)

    def check_draws(self, args: Any) -> None:
        """Raise InvalidProgramError where the teacher is not in memory, and the loss needs more than a draw of it."""
        if isinstance(self.pair.teacher, StoredTeacher):
            check_stored(self.loss, args, self._gradients.may_be(*NEEDS_ROWS))

    def terms_of(self, run: PairedRun, *, report: bool = False) -> list[SiteTerm]:
        """The terms of a run, with the loss's options."""
        return self.loss.compare(run, report=report, comparable=self.pair.comparable)

    def given(
        self, sites: Mapping[str, Any], targets: Collection[str], *, chance_of: Callable[[str], Chance] | None = None
    ) -> dict[str, Given]:
        """What the student is given; see :func:`~pyro_kd.losses.given_values.given_values`."""
        return given_values(self.loss, self._gradients, sites, targets, self.pair.latents, chance_of)

    @with_advice
    def look_at_latents(self, args: Any, kwargs: Any) -> None:
        """Find out, once per pair and options, which latents a loss can give by itself, and which have no derivative for it."""
        loss = self.loss
        decides = loss.teacher_forcing is None or "teacher_forcing" in loss.scheduled
        options = loss.targets, loss.discrete_gradient, loss.site_map, loss.fresh, loss.latent_divergence
        if not decides or (self.pair.latents is not None and self.pair.latents_with == options):
            return
        plain: Any = copy.copy(loss)
        plain.local_first, plain.vectorize_particles, plain.num_particles = 0.0, False, 1
        with keeping_random_state(), torch.no_grad(), without_effect(self.pair.student), poutine.block(), catch_warnings():
            simplefilter("ignore")  # the run that follows warns, also of modes
            pair = ProgramPair(self.pair.student, self.pair.teacher, has_agreeing_modes=True)
            run, terms = Evaluator(plain, pair).particle(args, kwargs, report=True)
        self.pair.latents, self.pair.latents_with = latents_of(run, terms, self._gradients), options

    def _rerun(self, args: Any, kwargs: Any) -> Rerun:
        """What runs the pair again as :meth:`particle` did."""
        student, teacher = self._programs(args, kwargs)
        options = {name: value for name, value in self._options.items() if name != "target_values"}
        return Rerun(student, teacher, args, kwargs, given_sites=self.given, known=self.pair, **options)

    def _in_particle_plate(self, program: Program) -> Program:
        depth, size = int(self.loss.max_plate_nesting), self.loss.num_particles
        wrapped: Program = pyro.plate("num_particles_vectorized", size, dim=-depth)(program)
        return wrapped

    @with_advice
    def guess_plate_nesting(self, args: Any, kwargs: Any) -> None:
        """Set the loss's ``max_plate_nesting`` as Pyro guesses it, from one run of the pair that leaves the student as it was."""
        self.check_draws(args)
        student, teacher = self.pair.student, self.pair.teacher
        with poutine.block(), evaluation_mode(student, teacher), keeping_random_state():
            run = self._run(student, teacher, args, kwargs)
        self.loss.max_plate_nesting = run.plate_nesting + (self.loss.num_particles > 1)

    @property
    def _options(self) -> dict[str, Any]:
        loss = self.loss
        return {"targets": loss.targets, "target_values": loss.target_values, "site_map": loss.site_map, "fresh": loss.fresh}

    @with_advice
    def check_learning(self, loss: Tensor, particles: Sequence[Particle], args: Any, kwargs: Any) -> None:
        """Check, once per pair of programs, that the loss depends on parameters of the student."""
        again = partial(self._leaves_of_new_run, args, kwargs)
        params = params_of_students([particle.run.student for particle in particles])
        check_parameters_are_reached([loss], params, self.pair.student, call_of(args, kwargs), again)
        self.pair.is_learning = True

    def check_svi(self, loss: Tensor, params: Mapping[str, Tensor], args: Any, kwargs: Any) -> None:
        """Check, once per pair of programs, that SVI trains the parameters of the student."""
        if not self.pair.is_seen_by_svi:
            check_params_are_captured(loss, params, (args, kwargs), partial(self._leaves_of_new_run, args, kwargs))
            self.pair.is_seen_by_svi = True

    def terms_of_new_run(self, args: Any, kwargs: Any) -> list[SiteTerm]:
        """The terms of a further run, which has no side effects."""
        with without_effect(self.pair.student):
            return self.particle(args, kwargs).terms

    def _leaves_of_new_run(self, args: Any, kwargs: Any) -> set[Tensor]:
        with without_effect(self.pair.student):
            return leaves_of([self.trained(self.particles(args, kwargs, report=False), *call_of(args, kwargs))])
