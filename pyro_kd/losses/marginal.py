r"""Marginal distillation: the KL between the exact laws of the targets, with all latents summed out."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_kd.errors import UnsupportedDivergenceError
from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.marginal_run import MarginalRun, run_marginals
from pyro_kd.losses.order import in_different_order
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.losses.program_pair import Program
from pyro_kd.losses.targets import Targets
from pyro_kd.losses.terms import SiteTerm
from pyro_kd.sites.enumeration import MAX_STATES
from pyro_kd.sites.pairing import names_in_student

__all__ = ["MarginalKD"]

_WITHOUT_MEANING = {
    "latent_weight": "its latents are summed out and have no terms",
    "latent_divergence": "its latents are summed out and have no terms",
    "latent_reduction": "its latents are summed out and have no terms",
    "divergence": "it is the KL between the laws of all targets together",
    "fresh": "its latents need no counterparts",
    "latent_form": "latents are summed out, and have no terms",
    "discrete_gradient": "latents are summed out, so that no gradient has to pass through a draw",
    "target_values": "the KL is an expectation over the teacher's own draws. For the likelihood of data: marginal_log_prob",
}


class MarginalKD(DistillationLoss):
    r"""The KL between the laws of the targets, by exact enumeration of all latents.

    .. math::
        L = KL(p_\phi(y | x) \| p_\theta(y | x)) = E_{y \sim p_\phi} \Big[ \log \sum_z p_\phi(y, z | x)
            - \log \sum_z p_\theta(y, z | x) \Big]

    It is what the surrogate and the local loss bound from above (Proposition 3.1 of the paper). The targets are drawn from the
    teacher, so the loss is an unbiased estimate, which may be negative; the derivative with respect to the student is exact for the
    drawn targets. Discrete latents are trained without a latent loss and without an estimator for their gradient.

    All latents of both programs must be discrete with a finite support: Bernoulli, Categorical, OneHotCategorical,
    Binomial, and vectors of these by ``to_event``. They need no counterparts in the other program: names, numbers and states may
    differ. Point masses are functions of other sites, and are allowed. The programs must broadcast over batch dimensions on the left,
    as for Pyro's parallel enumeration, and declare every other batch dimension by a plate. The rows of a plate must be independent.
    Whether they are is checked on the draws of one run, for each new set of shapes.

    Latents are summed out one after the other, each from the factors that contain it (variable elimination). So the memory is that of
    the largest table of densities: for the latents that one site, or one step of the elimination, depends on together, the product of
    their numbers of states, times the rows of the plates around it, times the states of enumerated targets. For a Markov chain with k
    states a layer that is :math:`k^2` times the rows, whatever its length; where a target depends on all latents, it is the number of
    their joint states. About as many tables are kept for the gradient as there are latents. A program has at most about 60 latents.

    Args:
        targets: names of the target sites, a predicate on Pyro's site dictionaries, or None for the sites that the teacher observes.
        enumerate_targets: sum over all values of the targets instead of drawing them: the loss is then exact, with a gradient without
            noise. Targets must be discrete with a finite support, and all their plates must hold all sites.
        cross_entropy: leave out the teacher's density. The loss is then the cross-entropy
            :math:`-E \log p_\theta(y | x)`, whose gradient is the same and whose minimum is not 0. The latents of the teacher may
            then be of any kind.
        control_variate: add a term with mean 0 that takes most of the noise out of the gradient, at about twice the cost: the local
            loss, less its estimate from the teacher's exact posterior. The loss is then, by the chain rule of the KL,

            .. math:: KL(p(z, y) \| q(z, y)) - E_y KL(p(z | y) \| q(z | y)),

            whose gradient is 0 for every draw of y where the programs are equal. The latents must have counterparts with the same
            states, and both programs must have their sites in one order.
        max_states: the largest number of elements that one table may have; 64 MiB in single precision by default. It is checked
            before memory is allocated.
        site_map: student's name of a target or plate -> teacher's, where they differ.
        **options: ``num_particles``, ``vectorize_particles``, ``max_plate_nesting`` and ``retain_graph`` of
            :class:`~pyro_kd.losses.base.DistillationLoss`.

    An element that a mask hides has no term, and its value counts as an input. A mask on a latent, as around the sites of Pyro's
    hidden Markov models, has to cover all sites alike: mask the targets alone, which gives the same law of them. A scale, such as
    that of a subsampled plate, must be the same number at all sites. A ``pyro.factor`` has no part in the loss.

    The terms, as in reports, are those of the chain rule: that of a target is the KL given the targets before it. Where
    the programs have their targets in different orders, the last target has the whole. In training, all targets are one term.

    Raises:
        UnsupportedDivergenceError: on a call: a latent cannot be enumerated, the tables would be larger than ``max_states``, a
            program draws outside of sample sites, or does not broadcast; the latents have no counterparts for ``control_variate``.
        PlateMismatchError: on a call: latents lie in plates that cannot be summed out one after the other, a batch dimension has no
            plate, or scales differ.
        TypeError: for an option that has no meaning here, such as ``latent_weight``.

    References:
        Chen, Liang, Zeng, Yao and Shao, A Unified Knowledge Distillation Framework for Deep Directed Graphical Models,
        CVPR 2023. Obermeyer et al., Tensor Variable Elimination for Plated Factor Graphs, ICML 2019.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd.losses import MarginalKD
        >>> def coin(heads):
        ...     with pyro.plate("rows", 1000):
        ...         z = pyro.sample("z", dist.Bernoulli(heads))
        ...         pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * z))
        >>> loss = MarginalKD(["y"], enumerate_targets=True)
        >>> round(loss.loss(lambda: coin(0.7), lambda: coin(0.5)) / 1000, 5)  # of Bernoulli(0.5) and Bernoulli(0.62)
        0.02966
    """

    def __init__(
        self,
        targets: Targets = None,
        *,
        enumerate_targets: bool = False,
        cross_entropy: bool = False,
        control_variate: bool = False,
        max_states: int = MAX_STATES,
        **options: Any,
    ) -> None:
        for name in options:
            if name in _WITHOUT_MEANING:
                raise TypeError(f"MarginalKD takes no {name}: {_WITHOUT_MEANING[name]}. Leave it out.")
        if not max_states >= 1:
            raise ValueError(f"max_states must be at least 1, not {max_states}")
        if control_variate and (enumerate_targets or cross_entropy):
            other = (
                "enumerate_targets has no noise to reduce" if enumerate_targets else "cross_entropy has no teacher's density"
            )
            raise ValueError(
                f"control_variate=True compares drawn targets with the teacher's posterior, and {other}: leave one out."
            )
        super().__init__(targets, latent_weight=1.0, **options)
        self.enumerate_targets = enumerate_targets
        self.control_variate = control_variate
        self.cross_entropy = cross_entropy
        self.max_states = max_states

    def refuses_draws(self, *, stored: bool) -> str:
        """A draw of the teacher has one state of its latents."""
        return "it runs the teacher on all states of its latents"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "latent_weight" and name in vars(self):
            raise TypeError(f"MarginalKD takes no latent_weight: {_WITHOUT_MEANING[name]}. Leave out its schedule.")
        super().__setattr__(name, value)

    def _rows(self) -> dict[str, str]:
        rows = super()._rows()
        del rows["latent_weight"]
        options = {
            "enumerate_targets": (self.enumerate_targets, False),
            "cross_entropy": (self.cross_entropy, False),
            "control_variate": (self.control_variate, False),
            "max_states": (self.max_states, MAX_STATES),
        }
        return rows | {name: repr(value) for name, (value, default) in options.items() if value != default}

    refused_options = tuple(_WITHOUT_MEANING)
    shares_noise = False
    compares_conditionals = False
    has_terms_of_reports = False  # all targets have one term

    def given_sites(self, teacher: Mapping[str, Any], targets: Collection[str]) -> Collection[str]:
        """The targets: latents are summed out."""
        return targets

    def run_programs(self, student: Program, teacher: Program, args: Any, kwargs: Any, **options: Any) -> MarginalRun:
        """Draw the targets from the teacher, and run both programs on all states of their latents."""
        return run_marginals(
            student,
            teacher,
            args,
            kwargs,
            **{name: options[name] for name in ("targets", "site_map", "record", "known") if name in options},
            max_states=self.max_states,
            enumerate_targets=self.enumerate_targets,
            has_teacher=self.enumerate_targets or not self.cross_entropy,
            gives_all=self.control_variate,
        )

    def compare(self, run: PairedRun, *, report: bool, comparable: set[tuple[Any, ...]]) -> list[SiteTerm]:
        """One term for all targets; in a report, one for each of them, given those before it."""
        assert isinstance(run, MarginalRun)
        names = run.targets
        log_p, log_q = run.log_densities(names)
        weights = log_p.exp() if self.enumerate_targets else None
        whole = self._mean(run, log_p, log_q, weights)
        if run.given_all is not None:
            found = in_different_order(run.given_all, names_in_student(self.site_map))
            if found is not None:
                raise UnsupportedDivergenceError(
                    f"control_variate needs both programs in one order: the teacher has site {found[0]!r} before {found[1]!r}, and "
                    f"the student has {found[1]!r} first. Write the student in the teacher's order, or leave out control_variate."
                )
            local = [term.value for term in super().compare(run.given_all, report=False, comparable=comparable)]
            whole = whole + torch.stack(local).sum() - self._scaled(run, run.expected_log_ratio())
        if not report:
            return [self._term(", ".join(names), whole)]
        values, before = list[Tensor](), torch.zeros_like(whole)
        for count in range(1, len(names)):
            total = before
            if run.has_one_order:
                total = self._mean(run, *run.log_densities(names[:count]), weights)
            values.append(total - before)
            before = total
        return [self._term(name, value) for name, value in zip(names, [*values, whole - before], strict=True)]

    def _mean(self, run: MarginalRun, log_p: Tensor, log_q: Tensor, weights: Tensor | None) -> Tensor:
        """The expectation of the log ratio of two densities, summed over rows; for enumerated targets, by their probabilities."""
        ratio = -log_q if self.cross_entropy else log_p - log_q
        if weights is not None:
            ratio = torch.where(weights > 0, weights * ratio, 0.0)
        return self._scaled(run, ratio.sum())

    def _scaled(self, run: MarginalRun, total: Tensor) -> Tensor:
        """A sum over rows, with their scale, and as a mean over particles."""
        total = total / (self.num_particles if self.vectorize_particles else 1)
        return total if isinstance(run.scale, float) and run.scale == 1 else run.scale * total

    def _term(self, name: str, value: Tensor) -> SiteTerm:
        return SiteTerm(name, "target", value, 1.0, "cross_entropy" if self.cross_entropy else "kl", self.enumerate_targets)
