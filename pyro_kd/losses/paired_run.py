"""One run of teacher and student on the same noise: what every loss compares. No weights and no divergences.

    teacher --record noise--> Taught --> student: given values, replayed noise --> pairs of sites --> PairedRun

Which values the student is given is the loss's choice, and so is what it makes of the pairs.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import unwrap
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor

from pyro_kd.errors import NoiseMismatchError, PyroKDError
from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.losses.giving import CollectingReplayMessenger, GiveMessenger, RecordNeededMessenger
from pyro_kd.losses.isolation import without_history
from pyro_kd.losses.observed import check_observed, check_observed_shapes
from pyro_kd.losses.targets import TargetMessenger, Targets
from pyro_kd.noise.between import BetweenDraw
from pyro_kd.noise.record import NoiseRecord
from pyro_kd.noise.streams import StreamWatch
from pyro_kd.sites.classification import compared_sites, observed_inputs
from pyro_kd.sites.pairing import SitePair, names_in_student, pair_sites
from pyro_kd.sites.plates import check_same_rows, differing_plates, lone_plates, size_error, sizes_of
from pyro_kd.sites.tracing import get_trace
from pyro_kd.sites.unpaired import unpaired_error

__all__ = ["PairedRun", "Taught", "check_inputs", "is_frozen", "pair_up", "record_teacher", "run_student"]

Program = Callable[..., Any]


class PairedRun(NamedTuple):
    """One run of both programs on the same noise.

    Attributes:
        pairs: the sites of both, in the teacher's execution order.
        student, teacher: the traces.
        noise: the teacher's.
        teacher_params: the parameters that the teacher's distributions depend on, and may hold themselves.
        guard: entered where the teacher's distributions are evaluated.
        between: what was drawn outside of sample sites, where the run has looked for it.
    """

    pairs: list[SitePair]
    student: Trace
    teacher: Trace
    noise: NoiseRecord
    teacher_params: set[Tensor]
    guard: Callable[[], AbstractContextManager[Any]] = nullcontext
    between: list[BetweenDraw] = []  # noqa: RUF012  (of a NamedTuple, and never changed)


class Taught(NamedTuple):
    """What a run of the teacher leaves.

    Attributes:
        trace: its trace.
        noise: what its draws are made of.
        finder: the handler that has found its targets, and what it observes.
        sites: its compared sites.
    """

    trace: Trace
    noise: NoiseRecord
    finder: TargetMessenger
    sites: dict[str, Any]

    @classmethod
    def of(cls, trace: Trace, noise: NoiseRecord, finder: TargetMessenger) -> "Taught":
        """With the sites of the trace."""
        return cls(trace, noise, finder, compared_sites(trace, finder.names))

    def giver(
        self,
        given: Collection[str],
        site_map: Mapping[str, str],
        replay: CollectingReplayMessenger,
        make: type[GiveMessenger] = GiveMessenger,
    ) -> GiveMessenger:
        """The handler that gives a student values of this run: at these sites, and at those that the teacher observes."""
        to_student = names_in_student(site_map)
        inputs = {to_student.get(name, name): value for name, value in observed_inputs(self.trace).items()}
        return make({to_student.get(name, name): self.sites[name] for name in given}, inputs, replay)


def record_teacher(
    teacher: Program, targets: Targets, args: Any, kwargs: Mapping[str, Any], watch: StreamWatch | None = None
) -> Taught:
    """Run a teacher and record its noise. The teacher stays as it is, and its parameters out of sight of SVI."""
    finder = TargetMessenger(targets)
    with (
        torch.no_grad(),
        nullcontext() if is_frozen(teacher) else evaluation_mode(teacher),
        poutine.block(hide_types=["param"]) if am_i_wrapped() else nullcontext(),
        RecordNeededMessenger(finder, watch) as noise,
        finder,
    ):
        trace = get_trace(teacher, args, kwargs)
    frozen = unwrap(teacher)
    runs_without_autograd = isinstance(frozen, FrozenProgram) and not frozen.differentiates
    return Taught.of(trace if runs_without_autograd else without_history(trace), noise, finder)


def run_student(
    student: Program, taught: Taught, replay: CollectingReplayMessenger, give: GiveMessenger, args: Any, kwargs: Any
) -> Trace:
    """Run a student on the teacher's noise, with values that it is given.

    Raises:
        PlateMismatchError: plates of other sizes have ended the run.
    """
    try:
        with replay, give:
            return get_trace(student, args, kwargs)
    except (ValueError, RuntimeError) as error:
        differ = differing_plates(student=give.sizes, teacher=sizes_of(taught.trace))
        if differ and isinstance(error, NoiseMismatchError) is isinstance(error, PyroKDError):
            raise size_error(differ, give.last) from error
        raise


def pair_up(
    taught: Taught,
    student: Trace,
    replay: CollectingReplayMessenger,
    give: GiveMessenger,
    site_map: Mapping[str, str],
    fresh: Collection[str],
) -> tuple[list[SitePair], PyroKDError | None]:
    """The pairs of sites of a run; and the error about sites and plates that one program has alone, if there are any."""
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
    """Raise where what goes into the two programs differs: rows of plates, or observed values.

    Raises:
        PlateMismatchError: a plate takes other rows.
        ObservedValueError: an observed value depends on what is trained, or differs.
    """
    to_student = names_in_student(site_map)
    check_same_rows(student=student, teacher=taught.trace, to_student=to_student, fresh=fresh)
    check_observed(give.observed, taught.finder.observed, to_student, call)
    check_observed_shapes(taught.finder.observed)


def is_frozen(teacher: Program) -> bool:
    """Whether a program is a frozen one, be it under Pyro's handlers."""
    return isinstance(unwrap(teacher), FrozenProgram)
