r"""What every distillation loss shares: its options, the interface of Pyro's ELBO, and the sum over particles.

    student, teacher --run_pair--> PairedRun --terms_of--> SiteTerm per site --combine--> one scalar

A new loss is a subclass that overrides one of two methods. :meth:`DistillationLoss.given_sites` chooses which of the teacher's
values the student is given; all other values are functions of the shared noise. :class:`~pyro_kd.losses.surrogate.SurrogateKD`
gives the targets, :class:`~pyro_kd.losses.local.LocalKD` every site. :meth:`DistillationLoss.combine` reduces the particles to one
number. Both are used wherever the loss is evaluated: in SVI, in training loops, in compiled graphs and in reports.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_kd.capture.compile import check_options
from pyro_kd.divergences import DivergenceFunction, kl
from pyro_kd.losses.discrete_gradients.choice import DiscreteGradient, DiscreteGradients
from pyro_kd.losses.evaluation import Evaluator, Particle
from pyro_kd.losses.finite import check_finite_gradients
from pyro_kd.losses.forcing import Given
from pyro_kd.losses.latent_form import LatentForm, check_form
from pyro_kd.losses.learning import is_capturing_params
from pyro_kd.losses.module import DistillationModule
from pyro_kd.losses.option_checks import check_choice, check_divergence, checked_fresh, checked_site_map, checked_targets
from pyro_kd.losses.paired_run import PairedRun, run_pair
from pyro_kd.losses.program_pair import Program, ProgramPair, ProgramPairs
from pyro_kd.losses.reuse import checked_reuse
from pyro_kd.losses.shares import loss_of, terms_of_shares
from pyro_kd.losses.targets import Targets, Weight
from pyro_kd.losses.terms import SiteTerm, SiteTerms, terms_of
from pyro_kd.utils.display import as_html, shown
from pyro_kd.utils.user_code import NeedsConstructor

__all__ = ["DistillationLoss", "Particle"]


class DistillationLoss(NeedsConstructor, ELBO):
    """Base class of losses between a student and a teacher program.

    Subclasses Pyro's ELBO. The student is the ``model``, and the teacher is the ``guide``, the program that is sampled from:
    ``SVI(student, teacher, optim, loss)`` and ``loss(student, teacher)`` work as with any ELBO.

    Args:
        targets: names of the target sites, or a predicate on Pyro's site dictionaries. None stands for the sites that the
            teacher observes (``obs=``) in the call. The values of targets are drawn from the teacher even where it observes data,
            unless ``target_values`` is ``"data"``. An observed site that is not a target is an input: both programs keep its value,
            and it has no term.
        target_values: ``"teacher"`` draws the values of targets from the teacher. ``"data"`` keeps the data that the call observes
            there, so that both programs are given the data's history :math:`y_{<j}` (Eq. 2). The distributions are compared as
            before; an estimate takes a draw of the teacher's distribution. Every target must be observed. The loss is then an
            expectation over the data, and bounds no KL between the two programs.
        latent_weight: weight of the latent terms: a number, a mapping by site name, or a function of the site name. A latent of
            weight 0 is left out: it has no term, and the student is not given its value.
        divergence: ``d(p, q, value)`` at target sites. It returns a tensor of shape ``batch_shape``; see :mod:`pyro_kd.divergences`.
        latent_divergence: likewise at latent sites.
        latent_form: ``"conditional"`` compares the distributions of a latent given its parents (Eq. 6 of the paper). ``"value"``
            compares the values of teacher and student on the shared noise (Eq. 5), by default by their squared distance. A form for
            all latents, a mapping by site name, or a function of the site name. Values without a derivative, such as counts, cannot
            be compared.
        latent_reduction: ``"sum"`` or ``"mean"`` over the dimensions of a latent's event.
        discrete_gradient: what gradient passes through the student's draws at latent sites whose family has none: ``"cut"``,
            ``"implicit"``, ``"boundary"``, ``"boundary_all"`` or ``"score"``, a mapping of site names to these (sites that it does
            not name are cut), or a function of the site name; see docs/discrete_gradients.md.
        site_map: student's site name -> teacher's, where they differ.
        fresh: latent sites of either program without a counterpart. They draw their own noise and have no term. ``"*"`` stands for
            all latents that only one program has.
        num_particles: number of noise samples to average over.
        max_plate_nesting: as in Pyro's ELBO; needed by ``vectorize_particles`` and guessed otherwise.
        vectorize_particles: draw the particles in one outer plate.
        retain_graph: passed to ``backward``.
        reuse: how many gradients each draw of the teacher serves, which costs the teacher's run only once: see docs/teacher_cache.md.
            A step that reuses a draw takes the draw's own arguments. What takes no gradient (``loss``, ``evaluate``) draws anew.

    Values at observed sites must be data: the same in both programs, and independent of what is trained. A batch dimension that no
    plate declares holds independent draws; with vectorized particles it is an error.

    Where teacher and student are both point masses (Delta), their KL is 0 or infinite.
    :func:`~pyro_kd.divergences.wasserstein2` then replaces :func:`~pyro_kd.divergences.kl` and its reverse.
    """

    _set_too = ("_pairs", "compile_options")
    shares_noise: bool = True
    """Whether the student runs on the teacher's noise, so that latents need counterparts."""
    compares_conditionals: bool = True
    """Whether the loss is a sum of divergences of conditional distributions, for which the order of the given sites matters."""
    runs_teacher_alone: bool = True
    """Whether the teacher runs once in each particle, as in :func:`~pyro_kd.losses.run_pair`. Else :meth:`run_programs` runs it."""
    has_terms_of_reports: bool = True
    """Whether a step has all terms that a report has, but for those of weight 0."""
    schedulable: tuple[str, ...] = ("latent_weight",)
    """The options that a :class:`~pyro_kd.training.DistillationObjective` may change from step to step."""
    refused_options: Collection[str] = ()
    """The options of this base class that the loss does not take, so that no message advises them."""
    scheduled: Collection[str] = ()
    """Those of them that it changes. A probability that changes tosses coins at 0 and 1 too, so that one graph serves all steps."""
    teacher_forcing: Weight | None = 0.0
    """The probability of teacher forcing; an option of :class:`~pyro_kd.losses.surrogate.SurrogateKD`. None leaves it open."""
    local_first: float = 0.0
    """Where ``teacher_forcing`` is left open, the probability at latents with a derivative: 1 in a fit's first quarter, then 0."""
    student_fraction: Weight = 0.0
    """How much of the targets' history is the student's; an option of :class:`~pyro_kd.losses.on_policy.OnPolicyKD`."""
    given_weight: Weight | None = None
    """The weight of latents that the student is given; None stands for ``latent_weight``."""

    def __init__(
        self,
        targets: Targets = None,
        *,
        target_values: str = "teacher",
        latent_weight: Weight = 0.1,
        divergence: DivergenceFunction = kl,
        latent_divergence: DivergenceFunction = kl,
        latent_form: LatentForm = "conditional",
        latent_reduction: str = "sum",
        discrete_gradient: DiscreteGradient = "cut",
        site_map: Mapping[str, str] | None = None,
        fresh: Collection[str] = (),
        num_particles: int = 1,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
        reuse: int = 1,
    ) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        check_choice("latent_reduction", latent_reduction, "sum", "mean")
        check_choice("target_values", target_values, "teacher", "data")
        for name, function in (("divergence", divergence), ("latent_divergence", latent_divergence)):
            check_divergence(name, function)
        check_form(latent_form)
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, not {num_particles}")
        self.reuse = checked_reuse(self, reuse)
        self.targets: Targets = checked_targets(targets)
        self.target_values = target_values
        self.latent_weight = latent_weight
        self.divergence = divergence
        self.latent_divergence = latent_divergence
        self.latent_form = latent_form
        self.latent_reduction = latent_reduction
        self.site_map = checked_site_map(site_map)
        self.discrete_gradient = DiscreteGradients(discrete_gradient, self.site_map).option
        self.fresh = checked_fresh(fresh)
        self._pairs = ProgramPairs()
        self.compile_options: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickling and copying, without what was found out about the programs."""
        return vars(self) | {"_pairs": ProgramPairs()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self._rows().items())})"

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, self._rows())

    def _rows(self) -> dict[str, str]:
        """The options that differ from their defaults."""
        rows = {"targets": shown(self.targets), "latent_weight": shown(self.latent_weight)}
        options: list[tuple[str, Any, Any]] = [
            ("target_values", self.target_values, "teacher"),
            ("divergence", self.divergence, kl),
            ("latent_divergence", self.latent_divergence, kl),
            ("latent_form", self.latent_form, "conditional"),
            ("latent_reduction", self.latent_reduction, "sum"),
            ("discrete_gradient", self.discrete_gradient, "cut"),
            ("site_map", self.site_map, {}),
            ("fresh", sorted(self.fresh), []),
            ("teacher_forcing", self.teacher_forcing, type(self).teacher_forcing),
            ("student_fraction", self.student_fraction, 0.0),
            ("given_weight", self.given_weight, type(self).given_weight),
            ("num_particles", self.num_particles, 1),
            ("vectorize_particles", self.vectorize_particles, False),
            ("reuse", self.reuse, 1),
        ]
        return rows | {name: shown(value) for name, value, default in options if value != default}

    def compile(self, **options: Any) -> "DistillationLoss":
        """Run the programs' handlers once per signature of the arguments, and a compiled graph after that.

        For ``SVI(student, teacher, optim, SurrogateKD(["x"]).compile())``; a loop in plain PyTorch calls ``compile()`` of the bound
        module. docs/performance.md describes what is captured, and when that pays off.

        Args:
            **options: ``max_graphs``, how many signatures get their own graph (default 8), and the options of ``torch.compile``:
                ``backend``, ``mode``, ``options``. With ``backend=None`` the graph runs uncompiled: it is ready in seconds, saves
                the cost of the handlers, and differs by rounding at most. With ``background=True`` it runs uncompiled until a process
                of its own has compiled it: nothing waits, and results differ by rounding from run to run.

        Returns:
            The loss itself.

        Raises:
            ValueError: ``background=True`` with options of ``torch.compile``.
        """
        check_options(options)
        self.compile_options = options
        self._pairs = ProgramPairs(self._pairs.told)
        return self

    @abstractmethod
    def given_sites(self, teacher: Mapping[str, Any], targets: Collection[str]) -> Collection[str] | Mapping[str, Given]:
        """Names of the teacher's sites whose values the student is conditioned on.

        Of these values, those that are not compared are not given: latents of weight 0, and elements that a mask or a scale of 0
        removes.

        Args:
            teacher: the teacher's sample sites in execution order: name -> Pyro's site dictionary.
            targets: names of the target sites among them.

        Returns:
            Names from ``teacher``; or a mapping from names to True, or to boolean tensors of the site's batch shape with the
            elements that are given.
        """

    def run_programs(self, student: Program, teacher: Program, args: Any, kwargs: Any, **options: Any) -> PairedRun:
        """Run both programs for one particle. Override it for a loss that needs them on several samples of the noise.

        Args:
            student, teacher: the programs, in an outer plate where particles are vectorized.
            args, kwargs: arguments of both.
            **options: the other arguments of :func:`~pyro_kd.losses.run_pair`.
        """
        return run_pair(student, teacher, args, kwargs, **options)

    def refuses_draws(self, *, stored: bool) -> str:
        """Why the loss cannot take draws of the teacher that were made before; empty where it can. Override it for such a loss.

        Args:
            stored: whether the teacher is not in memory. Otherwise draws are reused that the loss itself has made.
        """
        return ""

    def trained_programs(self) -> tuple[Program, ...]:
        """The programs besides the student whose parameters the loss trains: none, unless a loss overrides it."""
        return ()

    def trained_runs(self, student: Program, teacher: Program, args: Any, kwargs: Any) -> list[tuple[Program, Any, Any]]:
        """One run of each of :meth:`trained_programs`: a program, its positional arguments, and those by name.

        Args:
            student, teacher: the programs.
            args, kwargs: arguments of both.
        """
        return []

    def combine(self, particles: Sequence[Particle]) -> Tensor:
        """The loss as a function of the particles: by default the mean of their weighted sums of terms.

        Override it for an objective that is not a mean over particles, such as a multi-sample bound. It is then called with all
        particles at once, wherever the loss is evaluated. Use tensor operations on ``particle.terms``, whose values are scalars, or
        on ``particle.run.pairs``, whose distributions ``p`` (teacher) and ``q`` (student) have the batch shape of the site. All
        particles are then in memory at once. Take weights from the terms: a class that reads ``self.latent_weight`` is compiled anew
        for each value of it.

        Args:
            particles: ``num_particles`` of them; a single one, with means over an outer plate, where particles are vectorized.

        Returns:
            A scalar tensor.
        """
        sums = [torch.stack([term.weighted for term in particle.terms]).sum() for particle in particles]
        return sums[0] if len(sums) == 1 else torch.stack(sums).mean()

    def compare(self, run: PairedRun, *, report: bool, comparable: set[tuple[Any, ...]]) -> list[SiteTerm]:
        """The terms of a run, site by site (:func:`~pyro_kd.losses.terms.terms_of`), unless a loss overrides it."""
        return terms_of(
            run,
            divergence=self.divergence,
            latent_divergence=self.latent_divergence,
            latent_weight=self.latent_weight,
            given_weight=self.given_weight,
            latent_form=self.latent_form,
            latent_reduction=self.latent_reduction,
            num_vectorized=self.num_particles if self.vectorize_particles else 1,
            report=report,
            comparable=comparable,
        )

    # The interface of Pyro's ELBO: model is the student, guide the teacher.

    def __call__(self, student: Program, teacher: Program) -> DistillationModule:  # type: ignore[override]
        """Bind the loss to two programs. Returns an ``nn.Module`` whose call returns the differentiable loss."""
        self._pairs.of(student, teacher)
        return DistillationModule(self, student, teacher)

    def loss(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without gradients."""
        evaluator = self._evaluator(student, teacher)
        with torch.no_grad():
            return sum(float(share.loss) for share in evaluator.shares(args, kwargs))

    def loss_and_grads(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; adds its gradient to the ``grad`` of the student's parameters."""
        evaluator = self._evaluator(student, teacher)
        total, params = 0.0, dict[str, Tensor]()
        try:
            for share in evaluator.shares(args, kwargs):
                params |= share.params()
                if is_capturing_params():
                    evaluator.check_svi(share.loss, params, args, kwargs)
                share.loss.backward(retain_graph=self.retain_graph)
                check_finite_gradients(params)
                total += float(share.loss.detach())
        except BaseException:
            for param in params.values():  # earlier particles have added to it
                param.grad = None
            raise
        return total

    def differentiable_loss(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a scalar tensor, differentiable with respect to the student's parameters."""
        return loss_of(list(self._evaluator(student, teacher).shares(args, kwargs)))

    def terms(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> SiteTerms:
        """The terms of the loss by site, in the teacher's execution order, and the loss itself as ``terms.loss``.

        Values are scalar tensors, means over particles. Sites of weight 0 have a term too, if they can be compared. By default the
        loss is the sum of ``term.weight * term.value``. The dictionary is shown as a table.
        """
        return self._evaluator(student, teacher).terms(args, kwargs)

    def trained_terms(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> SiteTerms:
        """The terms of a step, none of weight 0, with its differentiable loss as ``terms.loss``; by a graph if there is one."""
        found = terms_of_shares(list(self._evaluator(student, teacher).shares(args, kwargs)))
        found.is_weighted_sum = not self.combines_particles
        return found

    def particles(self, student: Program, teacher: Program, *args: Any, **kwargs: Any) -> list[Particle]:
        """The particles of one call: the runs of both programs, and their terms, including those of weight 0."""
        return self._evaluator(student, teacher).particles(args, kwargs, report=True, keep_noise=True)

    def pair_of(self, student: Program, teacher: Program) -> ProgramPair:
        """What the loss knows about two programs, and the draws of the teacher that serve several gradients."""
        return self._pairs.of(student, teacher)

    def _evaluator(self, student: Program, teacher: Program) -> Evaluator:
        return Evaluator(self, self.pair_of(student, teacher))

    @property
    def combines_particles(self) -> bool:
        """Whether :meth:`combine` is overridden: then all particles are needed at once."""
        return getattr(self.combine, "__func__", None) is not DistillationLoss.combine

    def _guess_max_plate_nesting(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        self._evaluator(model, guide).guess_plate_nesting(args, kwargs)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(
            "a distillation loss runs its programs with run_pair, and takes no traces of a model and a guide"
        )
