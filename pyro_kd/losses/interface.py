"""What the evaluation of a loss asks of it, and gives to it."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from pyro_kd.losses.discrete_gradients.choice import DiscreteGradient
from pyro_kd.losses.forcing import Given
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.losses.program_pair import Program
from pyro_kd.losses.targets import Targets, Weight
from pyro_kd.losses.terms import SiteTerm

__all__ = ["Loss", "Particle", "terms_in"]


class Particle(NamedTuple):
    """One sample of the noise, with the run of both programs on it and the terms of the loss.

    Attributes:
        run: the run of both programs on that noise: pairs of sites with their distributions and values.
        terms: one per site that is compared, in the teacher's execution order. With ``vectorize_particles`` there is one particle,
            whose terms are means over the outer plate.
    """

    run: PairedRun
    terms: list[SiteTerm]


def terms_in(particles: Iterable[Particle]) -> Iterator[SiteTerm]:
    """The terms of all particles."""
    return (term for particle in particles for term in particle.terms)


class Loss(Protocol):
    """What is asked of a loss; see :class:`~pyro_kd.losses.base.DistillationLoss`."""

    targets: Targets
    target_values: str
    latent_weight: Weight
    teacher_forcing: Weight | None
    local_first: float
    given_weight: Weight | None
    student_fraction: Weight
    scheduled: Collection[str]
    latent_divergence: Any
    site_map: dict[str, str]
    fresh: frozenset[str]
    num_particles: int
    vectorize_particles: bool
    max_plate_nesting: float
    compile_options: dict[str, Any] | None
    discrete_gradient: DiscreteGradient
    compares_conditionals: bool
    refused_options: Collection[str]
    runs_teacher_alone: bool
    reuse: int

    @property
    def combines_particles(self) -> bool:
        """Whether ``combine`` is overridden."""

    def refuses_draws(self, *, stored: bool) -> str:
        """See :class:`~pyro_kd.losses.base.DistillationLoss`."""

    def given_sites(self, teacher: Mapping[str, Any], targets: Collection[str]) -> Collection[str] | Mapping[str, Given]:
        """See :class:`~pyro_kd.losses.base.DistillationLoss`."""

    def combine(self, particles: Sequence[Particle]) -> Tensor:
        """See :class:`~pyro_kd.losses.base.DistillationLoss`."""

    def run_programs(self, student: Program, teacher: Program, args: Any, kwargs: Any, **options: Any) -> PairedRun:
        """See :class:`~pyro_kd.losses.base.DistillationLoss`."""

    def compare(self, run: PairedRun, *, report: bool, comparable: set[tuple[Any, ...]]) -> list[SiteTerm]:
        """See :class:`~pyro_kd.losses.base.DistillationLoss`."""
