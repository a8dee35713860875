r"""The K-sample surrogate bound, which tends to the exact KL of the targets with the number of samples of the noise.

    run_programs: K samples of the noise for each row --> densities of the row's targets under each --> mixture_bound --> combine

The samples are the rows of the batch (:mod:`~pyro_kd.losses.batch_samples`) or further runs (:mod:`~pyro_kd.losses.sample_runs`).
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_kd.errors import PlateMismatchError, PyroKDError
from pyro_kd.isolation.effects import without_effect
from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.batch_samples import Shifts, batch_densities
from pyro_kd.losses.densities import log_density_at
from pyro_kd.losses.evaluation import Particle
from pyro_kd.losses.mixtures import GRADIENTS, mixture_bound
from pyro_kd.losses.paired_run import PairedRun, run_pair
from pyro_kd.losses.program_pair import Program, ProgramPair
from pyro_kd.losses.proposals import proposal_densities, proposal_run
from pyro_kd.losses.recording import record_teacher
from pyro_kd.losses.row_exchange import exchange_of
from pyro_kd.losses.rows import batch_depth, row_plates, row_scale, scores_of, summed
from pyro_kd.losses.sample_runs import SampledRun, loop_run, plate_run
from pyro_kd.losses.targets import Targets, Weight
from pyro_kd.losses.teacher_draws import is_plain
from pyro_kd.sites.pairing import SitePair, names_in_student
from pyro_kd.utils.advice import advice
from pyro_kd.utils.tensors import tensors_in

__all__ = ["MultiSampleKD"]

logger = logging.getLogger("pyro_kd.losses")


class _Plan(NamedTuple):
    """How a pair of programs gets its samples.

    Attributes:
        reuses_batch: whether the rows of the batch serve each other as samples.
        depth: the number of batch dimensions of the programs.
    """

    reuses_batch: bool
    depth: int


class MultiSampleKD(DistillationLoss):
    r"""The K-sample surrogate bound: both programs average the density of the targets over K samples of the noise.

    .. math::
        KL(p_\phi(y) \,\|\, p_\theta(y)) \;\le\; L_K = E_{\epsilon_{1:K}}
            KL\Big( \tfrac1K \sum_k p_\phi(y | \epsilon_k) \,\Big\|\, \tfrac1K \sum_k p_\theta(y | \epsilon_k) \Big),
            \qquad p(y | \epsilon) = \prod_j p(y_j | y_{<j}, \epsilon)

    :math:`L_1` is the first sum of :class:`~pyro_kd.losses.surrogate.SurrogateKD`. The bound does not increase with K, and tends to
    the KL of the targets alone: unlike :math:`L_1`, it does not ask that teacher and student use their latents alike. It is
    estimated without bias by y from the teacher under :math:`\epsilon_1`, as the difference of the two logarithms of means.

    The derivative reaches continuous latents through their values. ``gradient`` says how it reaches the others, such as discrete
    ones; with weights :math:`w_k \propto p_\theta(y | \epsilon_k)` of a row:

    - ``"score"``: :math:`-\sum_k (w_k - 1/K) \nabla \log p_\theta(z_k)`. It estimates the gradient of the exact KL with a bias of
      order 1/K, which vanishes where student and teacher are equal. Its weights lie between -1 and 1, so its variance is small.
    - ``"leave_one_out"``: the score of each of samples 2 to K times what that sample adds to the logarithm of their mean. It is
      unbiased for the bound without sample 1 in the student's mean, and has a larger variance. Sample 1 shares its noise with y:
      given y, its latents do not follow the student's distribution, and their score is of no use. K must be at least 3.
    - ``"cut"``: none.

    Several processes do not gather samples: each averages over K of its own, and their mean, the bound for K, is minimised.

    Args:
        targets: names of the target sites, a predicate on Pyro's site dictionaries, or None for the sites that the
            teacher observes.
        num_samples: K. One sample is :class:`~pyro_kd.losses.surrogate.SurrogateKD`, closed forms and cut gradient included.
        gradient: ``"score"``, ``"leave_one_out"`` or ``"cut"``.
        reuse_batch: whether the K samples of a row are its own latents and those of K - 1 other rows: B rows then need B runs, not
            B K. It is right only where a row's distributions depend on its latents alone, not on its other targets or inputs. None
            finds that out when the loss first meets the two programs and the kinds of arguments, and else takes runs. A row is
            an element of the plates that hold every latent and target. Where an argument
            has a number for each row, it takes runs.
        vectorize: whether K runs are one run in an outer plate; False for programs that do not broadcast.
        chunk_size: how many of a row's samples from the batch are scored at once, to bound memory; the backward pass computes them
            again. None bounds the values of a target by 2^24 numbers.
        proposal: ``f(values, *args, **kwargs)`` draws the student's latents for targets, given by the student's names, as an encoder
            does. The student then averages the importance weights p(y, z) / q(z | y) of K draws, which are independent of the
            noise, and the gradients reach the proposal too. SVI and ``Distiller`` train its parameters; so does any optimiser that
            has them.
        latent_weight: weight of the latent terms of Eq. 6, which are 0 by default: they would ask for equal use of latents.
        **options: see :class:`~pyro_kd.losses.base.DistillationLoss`; there is no choice of ``divergence``.

    Raises:
        PlateMismatchError: the programs do not broadcast over samples, targets have different scales, or ``reuse_batch=True`` where
            the rows are not those of one plate.
        UnsupportedDivergenceError: a target has no density.

    References:
        Chen, Liang, Zeng, Yao and Shao, CVPR 2023, for :math:`L_1`. Burda, Grosse and Salakhutdinov, Importance Weighted
        Autoencoders, ICLR 2016. Bornschein and Bengio, Reweighted Wake-Sleep, ICLR 2015, for ``"score"``. Mnih and Rezende,
        Variational Inference for Monte Carlo Objectives, ICML 2016, for ``"leave_one_out"``.

    Example:
        The bit has the opposite meaning in the student, so that the distributions of y are equal:

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd import MultiSampleKD, SurrogateKD, freeze
        >>> def coin(logits):
        ...     def model():
        ...         with pyro.plate("rows", 500):
        ...             z = pyro.sample("z", dist.Bernoulli(0.5))
        ...             pyro.sample("y", dist.Bernoulli(logits=logits[z.long()]))
        ...     return model
        >>> student, teacher = coin(torch.tensor([2.0, -2.0])), freeze(coin(torch.tensor([-2.0, 2.0])))
        >>> pyro.set_rng_seed(0)
        >>> round(SurrogateKD(["y"], latent_weight=0.0).loss(student, teacher) / 500, 3)
        1.523
        >>> abs(MultiSampleKD(["y"], num_samples=64).loss(student, teacher) / 500) < 0.1
        True
    """

    runs_teacher_alone = False
    refused_options = ("divergence", "target_values", "discrete_gradient")

    def __init__(
        self,
        targets: Targets = None,
        *,
        num_samples: int = 16,
        gradient: str = "score",
        reuse_batch: bool | None = None,
        vectorize: bool = True,
        chunk_size: int | None = None,
        proposal: Program | None = None,
        latent_weight: Weight = 0.0,
        **options: Any,
    ) -> None:
        if "divergence" in options:
            raise TypeError(
                "MultiSampleKD has no divergence to choose: it bounds the KL of the targets. latent_divergence is that of the latent "
                "terms; SurrogateKD takes any divergence."
            )
        if options.get("target_values", "teacher") != "teacher":
            raise TypeError("MultiSampleKD takes no target_values: its bound is a mean over the teacher's own draws.")
        if options.get("discrete_gradient", "cut") != "cut":
            raise TypeError(
                "MultiSampleKD takes no discrete_gradient: gradient='score' or 'leave_one_out' is that of its bound."
            )
        super().__init__(targets, latent_weight=latent_weight, **options)
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be 'score', 'leave_one_out' or 'cut', not {gradient!r}")
        least = 3 if gradient == "leave_one_out" else 1
        for name, number, lowest in (("num_samples", num_samples, least), ("chunk_size", chunk_size, 1)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                raise TypeError(f"{name} must be a whole number, such as 16, not {number!r:.60}")
            if number is not None and number < lowest:
                why = " for gradient='leave_one_out', which compares samples 2 to K with each other" if lowest == 3 else ""
                raise ValueError(f"{name} must be at least {lowest}{why}, not {number}")
        if reuse_batch not in (None, True, False):
            raise ValueError(f"reuse_batch must be None, True or False, not {reuse_batch!r:.60}")
        if proposal is not None and (reuse_batch or not vectorize or num_samples == 1 or latent_weight != 0):
            raise ValueError(
                "a proposal draws the student's latents for the targets of each row, in an outer plate: it needs num_samples of at "
                "least 2 and vectorize=True, and has no part for reuse_batch and latent_weight"
            )
        self.num_samples = num_samples
        self.gradient = gradient
        self.reuse_batch = reuse_batch
        self.vectorize = vectorize
        self.chunk_size = chunk_size
        self.proposal = proposal

    @property
    def compares_conditionals(self) -> bool:  # type: ignore[override]
        """Whether it is one sample, which compares conditional distributions. More compare joint densities."""
        return self.num_samples == 1

    def refuses_draws(self, *, stored: bool) -> str:
        """Draws made without the loss have one sample for each row."""
        return "it has several samples of the teacher's noise for each row" if stored and self.num_samples > 1 else ""

    def _rows(self) -> dict[str, str]:
        names = ("num_samples", "gradient", "reuse_batch", "vectorize", "chunk_size", "proposal")
        defaults = ("", "score", None, True, None, None)
        own = zip(names, defaults, strict=True)
        return super()._rows() | {name: repr(getattr(self, name)) for name, value in own if getattr(self, name) != value}

    def given_sites(self, teacher: Mapping[str, Any], targets: Collection[str]) -> Collection[str]:
        """The targets: latents become functions of the shared noise."""
        return targets

    def run_programs(self, student: Program, teacher: Program, args: Any, kwargs: Any, **options: Any) -> PairedRun:
        """Run both programs on K samples of the noise for each row."""
        if self.num_samples == 1 or not is_plain(options.get("record", record_teacher)):  # draws for a report
            return run_pair(student, teacher, args, kwargs, **options)
        plan = self._plan(options["known"], args, kwargs, options | {"record": record_teacher})
        if plan.reuses_batch:
            run = run_pair(student, teacher, args, kwargs, **options)
            num_rows = self._shifts(run).num_rows
            if num_rows >= self.num_samples:
                return SampledRun.of(run)
            if self.reuse_batch:
                raise ValueError(
                    f"num_samples={self.num_samples} with reuse_batch=True needs a batch of at least {self.num_samples} rows, not "
                    f"{num_rows}. Take fewer samples, more rows, or reuse_batch=None, which runs the programs K times where a batch "
                    "is too small."
                )
        if not self.vectorize:
            return loop_run(student, teacher, args, kwargs, self.num_samples, **options)
        run_in_plate = self._try_plate if plan.reuses_batch else self._plate_run  # a plan without reuse has tried it
        return run_in_plate(student, teacher, args, kwargs, plan, options)

    def trained_programs(self) -> tuple[Program, ...]:
        """The proposal, if there is one."""
        return () if self.proposal is None else (self.proposal,)

    def trained_runs(self, student: Program, teacher: Program, args: Any, kwargs: Any) -> list[tuple[Program, Any, Any]]:
        """A run of the proposal on targets of the teacher, as in an evaluation of the loss."""
        run_of = partial(proposal_run, targets=self.targets, site_map=self.site_map, num_samples=self.num_samples)
        return [run_of(program, student, teacher, args, kwargs) for program in self.trained_programs()]

    def _plan(self, known: ProgramPair, args: Any, kwargs: Any, options: dict[str, Any]) -> _Plan:
        """How this pair gets its samples, found out once for each kind of arguments by runs that have no effect."""
        kinds = (self.reuse_batch, *map(_kind, args), *((name, _kind(value)) for name, value in sorted(kwargs.items())))
        if kinds not in known.sample_plans:
            student, teacher = known.student, known.teacher
            with without_effect(student):
                run = run_pair(student, teacher, args, kwargs, **options)
            reuses = bool(self.reuse_batch)
            if self.reuse_batch is None and self.proposal is None:
                to_student = names_in_student(self.site_map)
                names = [to_student.get(pair.name, pair.name) for pair in run.pairs if pair.is_target]
                exchange = exchange_of(run, student, teacher, args, kwargs, names)
                reason = "" if exchange.is_by_latents else str(exchange)
                if not reason and _has_numbers_of_rows(run, args, kwargs):  # equal in this call, and perhaps not in the next
                    reason = "an argument has numbers of rows"
                reuses = not reason
                logger.info("MultiSampleKD: %s", "the batch as its own K" if reuses else f"K runs, because {reason}")
            found = _Plan(reuses, batch_depth(run.student, run.teacher))
            if self.vectorize and not reuses:
                with without_effect(student):
                    self._try_plate(student, teacher, args, kwargs, found, options)
            known.sample_plans[kinds] = found
        plan: _Plan = known.sample_plans[kinds]
        return plan

    def _plate_run(
        self, student: Program, teacher: Program, args: Any, kwargs: Any, plan: _Plan, options: Mapping[str, Any]
    ) -> SampledRun:
        depth = plan.depth if math.isinf(self.max_plate_nesting) else max(plan.depth, int(self.max_plate_nesting))
        return plate_run(student, teacher, args, kwargs, self.num_samples, -1 - depth, self.proposal, **options)

    def _try_plate(self, *run: Any) -> SampledRun:
        """Run in an outer plate, and raise PlateMismatchError where a program does not, although it runs without."""
        try:
            return self._plate_run(*run)
        except PyroKDError:
            raise
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            first = next(iter(str(error).strip().splitlines()), "")
            raise PlateMismatchError(
                f"a program does not broadcast over {self.num_samples} samples in an outer plate ({type(error).__name__}: {first}). "
                "Let it index and expand from the right, as for vectorize_particles; or take MultiSampleKD(..., vectorize=False), "
                f"which runs it once for each sample{', among upper_bounds' if advice().is_final else ''}."
            ) from error

    def _shifts(self, run: PairedRun) -> Shifts:
        rows = row_plates(run)
        dims = [dim for dim, name in rows.items() if name != "num_particles_vectorized"]
        if len(dims) != 1:
            raise PlateMismatchError(
                f"reuse_batch=True needs one plate that holds every latent and target, whose rows serve each other as samples; there "
                f"are {len(dims)}. Put both programs into one pyro.plate; or take reuse_batch=False, which runs them K times."
            )
        return Shifts(dims[0], run.pairs[0].p.batch_shape[dims[0]], self.num_samples)

    def combine(self, particles: Sequence[Particle]) -> Tensor:
        """The bounds of all rows, and the latent terms, averaged over particles."""
        if self.num_samples == 1:
            return super().combine(particles)
        losses = []
        for particle in particles:
            latents = [term.weight * term.value for term in particle.terms if term.kind == "latent"]
            losses.append(torch.stack([self._bound(particle.run), *latents]).sum())
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _bound(self, run: PairedRun) -> Tensor:
        assert isinstance(run, SampledRun)
        rows = list(row_plates(run))
        if run.sample_dim is None and not run.others:
            found = batch_densities(run, self._shifts(run), rows, self.chunk_size)
        else:
            found = _densities(run, rows)
        if run.proposed is None:
            return self._total(run, rows, mixture_bound(*found, self.gradient))
        is_unbiased = self.gradient == "leave_one_out"
        ratio, scores = proposal_densities(run.student, run.proposed, rows, trains_bits=is_unbiased)
        bounds = mixture_bound(found[0], found[1] + ratio, scores, self.gradient, is_first_coupled=False)
        return self._total(run, rows, bounds)

    def _total(self, run: PairedRun, rows: Sequence[int], bounds: Tensor) -> Tensor:
        total = row_scale(run, rows) * bounds.sum()
        return total / self.num_particles if self.vectorize_particles else total


def _densities(run: SampledRun, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log densities of the targets of each row under each sample, where each has its own run.

    Args:
        run: the run.
        rows: the dimensions of samples, if they are in an outer plate, and rows.

    Returns:
        The teacher's and the student's log densities, and the student's scores or None, each of shape ``(K, *rows)``.
    """
    runs: list[tuple[PairedRun, list[SitePair]]] = [(run, run.scored), *((other, other.pairs) for other in run.others)]
    with ExitStack() as stack:
        for other in run.others:
            stack.enter_context(other.evaluating())
        with torch.no_grad():
            log_p = [_log_density(pairs, rows, of_teacher=True) for _, pairs in runs]
        log_q = [_log_density(pairs, rows, of_teacher=False) for _, pairs in runs]
    found = [scores_of(each.student, rows) for each, _ in runs]
    scores = [score for score in found if score is not None]
    if run.sample_dim is not None:
        return log_p[0], log_q[0], scores[0] if scores else None
    return torch.stack(log_p), torch.stack(log_q), torch.stack(scores) if scores else None


def _log_density(pairs: Sequence[SitePair], rows: Sequence[int], *, of_teacher: bool) -> Tensor:
    """The log density of the targets of each row, with their masks."""
    total: Any = 0.0
    for pair in pairs:
        if pair.is_target:
            found = log_density_at(pair, pair.p if of_teacher else pair.q, pair.value)
            if pair.mask is not None:
                found = torch.where(torch.as_tensor(pair.mask, device=found.device), found, torch.zeros_like(found))
            total = total + summed(found, rows)
    return total


def _has_numbers_of_rows(run: PairedRun, args: Any, kwargs: Any) -> bool:
    """Whether a tensor among the arguments has a dimension of the size of the rows, so that rows may differ by more than latents."""
    (dim,) = row_plates(run)
    num_rows = run.pairs[0].p.batch_shape[dim]
    return any(num_rows in tensor.shape for tensor in tensors_in((args, kwargs)))


def _kind(argument: Any) -> Any:
    """What of an argument may decide on the structure of a program: its type, of tensors the type and rank, and its flags."""
    if isinstance(argument, bool | str | None):
        return argument
    return type(argument), *((tensor.dtype, tensor.dim()) for tensor in tensors_in(argument))
