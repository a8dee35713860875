"""One run of teacher and student on the same noise, which every loss compares. It knows no weights and no divergences.

    teacher --record noise--> Taught --> student: given values, replayed noise --> pairs of sites --> PairedRun

The loss chooses which values the student is given, and how it compares the pairs.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_kd.errors import NoiseMismatchError, PyroKDError, UnknownTargetError
from pyro_kd.isolation.effects import guarded
from pyro_kd.isolation.freezing import is_frozen, without_grad
from pyro_kd.losses.discrete_gradients.choice import DiscreteGradients
from pyro_kd.losses.forcing import Given
from pyro_kd.losses.giving import (
    CollectingReplayMessenger,
    GiveMessenger,
    OwnDraw,
)
from pyro_kd.losses.ownership import check_no_shared_parameters, teacher_leaves
from pyro_kd.losses.program_pair import Program, ProgramPair
from pyro_kd.losses.recording import Taught, record_teacher
from pyro_kd.losses.targets import Targets, require_targets
from pyro_kd.losses.teacher_draws import StoredTeacher
from pyro_kd.noise.between import BetweenDraw
from pyro_kd.noise.record import NoiseRecord
from pyro_kd.sites.classification import compared_sites
from pyro_kd.sites.observed import check_observed, check_observed_shapes
from pyro_kd.sites.pairing import SitePair, names_in_student, pair_sites
from pyro_kd.sites.plates import check_same_rows, differing_plates, lone_plates, size_error, sizes_of
from pyro_kd.sites.tracing import get_trace
from pyro_kd.sites.unpaired import unpaired_error
from pyro_kd.utils import guards

__all__ = [
    "GivenSites",
    "PairedRun",
    "as_mapping",
    "check_inputs",
    "hinting_at_swapped",
    "pair_up",
    "run_pair",
    "run_student",
]

GivenSites = Callable[[Mapping[str, Any], Collection[str]], Collection[str] | Mapping[str, Given]]
"""``f(teacher_sites, target_names)`` returns the names of the sites whose values the student is given.

It may also return a mapping from these names to True, or to a boolean tensor of the site's batch shape: which elements are given.
"""

_SWAPPED = (
    "The student is a frozen program. If it is the teacher, swap them: loss(student, teacher), SVI(student, teacher, ...), "
    "Distiller(student, teacher, ...)."
)


@dataclass
class PairedRun:
    """One run of both programs on the same noise.

    Attributes:
        pairs: the sites of both, in the teacher's execution order.
        student: the student's trace.
        teacher: the teacher's trace.
        noise: the noise that both ran on.
        given: the sites whose values the student was given, by the teacher's names: True, or a boolean tensor of the site's batch
            shape with the elements that it was given.
        guard: makes the context in which the teacher's distributions are evaluated.
        between: what was drawn outside of sample sites, if the run has looked for it.
        teacher_leaves: parameters that the teacher's distributions hold; a loss treats them as constants.
        drawn: the student's own draws with their noise, by its names, if gradients pass through discrete ones.
    """

    pairs: list[SitePair]
    student: Trace
    teacher: Trace
    noise: NoiseRecord
    given: Mapping[str, Given] = field(default_factory=dict)
    guard: Callable[[], AbstractContextManager[Any]] = nullcontext
    between: list[BetweenDraw] = field(default_factory=list)
    teacher_leaves: set[Tensor] = field(default_factory=set)
    drawn: dict[str, OwnDraw] = field(default_factory=dict)

    @property
    def plate_nesting(self) -> int:
        """The number of dimensions that plates take in the two programs."""
        nodes: list[Any] = [*self.student.nodes.values(), *self.teacher.nodes.values()]
        frames = [frame for site in nodes if site["type"] == "sample" for frame in site["cond_indep_stack"]]
        return -min((frame.dim for frame in frames if frame.vectorized), default=0)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Give the teacher no gradient, and keep modules in its distributions unchanged, while densities of the run are evaluated."""
        with without_grad(self.teacher_leaves), self.guard():  # no_grad would not detach what a distribution holds
            yield


def only_targets(sites: Mapping[str, Any], targets: Collection[str]) -> Collection[str]:
    """Give the student only the targets: latents are functions of the shared noise."""
    return targets


def as_mapping(
    given: Collection[str] | Mapping[str, Given], sites: Collection[str], targets: Collection[str]
) -> Mapping[str, Given]:
    """What ``given_sites`` returned, as a mapping.

    Raises:
        TypeError: it is no collection of names.
        UnknownTargetError: a name is not a sample site of the teacher, or a target is left out.
    """
    if isinstance(given, str) or not isinstance(given, Collection):
        raise TypeError(f"given_sites must return the names of sites, such as [*targets, 'z'], not {given!r:.60}")
    if unknown := [name for name in given if name not in sites]:
        raise UnknownTargetError(
            f"given_sites returned {', '.join(map(repr, unknown))}, not among the teacher's sample sites, which are "
            f"{', '.join(map(repr, sites))}. Choose among the names in its first argument, which has the sites of this run."
        )
    if missing := [name for name in targets if name not in given]:
        raise UnknownTargetError(
            f"given_sites left out the target {', '.join(map(repr, missing))}. The student is always given the teacher's values at "
            "targets: return [*targets, ...]."
        )
    return given if isinstance(given, Mapping) else dict.fromkeys(given, True)


def run_pair(
    student: Program,
    teacher: Program,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    targets: Targets = None,
    target_values: str = "teacher",
    given_sites: GivenSites = only_targets,
    site_map: Mapping[str, str] | None = None,
    fresh: Collection[str] = (),
    record: Callable[..., Taught] = record_teacher,
    known: ProgramPair | None = None,
    gradients: DiscreteGradients | None = None,
) -> PairedRun:
    """Run the teacher, then the student on its noise and on the values that it is given.

    Args:
        student, teacher: the programs.
        args, kwargs: arguments of both.
        targets: names of the target sites, a predicate on Pyro's site dictionaries, or None for the sites that the teacher observes.
        target_values: ``"teacher"`` for its draws at the targets, or ``"data"`` for what it observes there.
        given_sites: chooses which of the teacher's values the student is given; by default the targets. It returns names, or a
            mapping from names to boolean tensors of the site's batch shape: the elements that are given.
        site_map: student's site name -> teacher's, where they differ.
        fresh: latent sites of either program without a counterpart; ``"*"`` stands for all of them.
        record: runs the teacher, see :func:`record_teacher`.
        known: what earlier runs have shown about the two programs.
        gradients: what gradients pass through the student's discrete draws; none, if it is omitted.

    Returns:
        The run. Its pairs are not compared yet: :func:`~pyro_kd.losses.terms.terms_of` does that, and raises if they cannot be.

    Raises:
        NoTargetsError, UnknownTargetError: there are no targets, or a target is not a site.
        UnpairedSiteError: a site or a plate is in one program only.
        PlateMismatchError: a plate takes different rows in the two programs.
        ObservedValueError: an observed value depends on what is trained, or differs between the programs; or a target is to keep its
            data, and is not observed.
        NoiseMismatchError, UnsupportedNoiseError: a latent cannot share noise.
        SharedParameterError: a parameter belongs to both programs.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_kd.losses import run_pair
        >>> def program(loc):
        ...     z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 0.5))
        >>> run = run_pair(lambda: program(1.0), lambda: program(0.0), targets=["y"])
        >>> [(pair.name, pair.is_target, round(float(pair.student_value - pair.value), 4)) for pair in run.pairs]
        [('z', False, 1.0), ('y', True, 0.0)]
    """
    kwargs, site_map = dict(kwargs or {}), dict(site_map or {})
    known = ProgramPair(student, teacher) if known is None else known
    known.between.begin()
    with hinting_at_swapped(student):
        taught = record(teacher, targets, args, kwargs, known, target_values)
        require_targets(taught.finder.names, taught.sites, targets, taught.finder.observed)
        looks = known.between.looks or guards.is_active()
        replay = CollectingReplayMessenger(taught.noise, site_map, fresh, looks_between=looks, gradients=gradients)
        names = taught.finder.names.keys()
        given = as_mapping(given_sites(taught.sites, names), taught.sites, names)
        give = taught.giver(given, site_map, replay)
        with known.between.around_student(taught.noise, replay), known.autograd_in_student():
            trace = run_student(student, taught, replay, give, args, kwargs)
        pairs, error = pair_up(taught, trace, replay, give, site_map, fresh)
        if error is not None:
            raise error
        check_inputs(taught, trace, give, site_map, fresh, (args, kwargs))
        guard = partial(guarded, teacher, [pair.p for pair in pairs], [pair.q for pair in pairs])
        between = [*taught.noise.lost_between, *replay.between]
        run = PairedRun(pairs, trace, taught.trace, taught.noise, given, guard, between)
        run.drawn = replay.drawn
        if not is_frozen(known.teacher):
            check_no_shared_parameters(trace, taught.trace, known.student, known.teacher)
        if torch.is_grad_enabled() and not isinstance(known.teacher, StoredTeacher):
            run.teacher_leaves = teacher_leaves(run, known, teacher, args, kwargs)
    return run


def run_student(
    student: Program, taught: Taught, replay: CollectingReplayMessenger, give: GiveMessenger, args: Any, kwargs: Any
) -> Trace:
    """Run a student on the teacher's noise, with the values that it is given.

    Raises:
        PlateMismatchError: plates have different sizes in the two programs, so that the run failed.
    """
    try:
        with replay, give:
            return get_trace(student, args, kwargs)
    except (ValueError, RuntimeError) as error:
        differ = differing_plates(student=give.sizes, teacher=sizes_of(taught.trace))
        if differ and isinstance(error, NoiseMismatchError) is isinstance(error, PyroKDError):
            given = give.sites.get(give.last)
            raise size_error(differ, give.last, is_target=given is not None and given["name"] in give.targets) from error
        raise


def pair_up(
    taught: Taught,
    student: Trace,
    replay: CollectingReplayMessenger,
    give: GiveMessenger,
    site_map: Mapping[str, str],
    fresh: Collection[str],
) -> tuple[list[SitePair], PyroKDError | None]:
    """The pairs of sites of a run, and the error about sites and plates that are in one program only, if there are any."""
    to_student = names_in_student(site_map)
    targets = taught.finder.names
    pairs, sites = pair_sites(
        student=compared_sites(student, give.sites),
        teacher=taught.sites,
        targets=targets,
        to_student=to_student,
        fresh=fresh,
    )
    if not (sites or replay.unpaired):
        return pairs, None
    plates = lone_plates(student=student, teacher=taught.trace, to_student=to_student, missing=replay.unpaired)
    if not sites and not plates:
        return pairs, next(iter(replay.unpaired.values()))
    differ = differing_plates(student=sizes_of(student), teacher=sizes_of(taught.trace))
    return pairs, unpaired_error([sites, plates], targets=targets, site_map=site_map, fresh=sorted(fresh), plates=differ)


def check_inputs(
    taught: Taught, student: Trace, give: GiveMessenger, site_map: Mapping[str, str], fresh: Collection[str], call: Any
) -> None:
    """Raise where the inputs of the two programs differ: rows of plates, or observed values.

    Raises:
        PlateMismatchError: a plate takes different rows in the two programs.
        ObservedValueError: an observed value depends on what is trained, or differs between the programs.
    """
    to_student = names_in_student(site_map)
    check_same_rows(student=student, teacher=taught.trace, to_student=to_student, fresh=fresh)
    check_observed(give.observed, taught.finder.observed, to_student, call)
    check_observed_shapes(taught.finder.observed)


@contextmanager
def hinting_at_swapped(student: Any) -> Iterator[None]:
    """Where the student is a frozen program, add to an error about the pair that the two may be swapped."""
    try:
        yield
    except PyroKDError as error:
        if is_frozen(student) and _SWAPPED not in str(error):
            error.args = (f"{error} {_SWAPPED}",)
        raise
