"""A run of the teacher, with its noise: the first half of a paired run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import unwrap
from pyro.poutine.runtime import am_i_wrapped

from pyro_kd.isolation.effects import without_history
from pyro_kd.isolation.freezing import FrozenProgram, is_frozen
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.losses.forcing import Given
from pyro_kd.losses.giving import CollectingReplayMessenger, GiveMessenger, RecordNeededMessenger, ReplayTeacherMessenger
from pyro_kd.losses.program_pair import Program, ProgramPair
from pyro_kd.losses.targets import TargetMessenger, Targets, require_data
from pyro_kd.noise.record import NoiseRecord
from pyro_kd.noise.streams import StreamWatch
from pyro_kd.sites.classification import compared_sites, observed_inputs
from pyro_kd.sites.pairing import names_in_student
from pyro_kd.sites.tracing import get_trace
from pyro_kd.utils import guards

__all__ = ["Taught", "apart", "record_teacher", "replay_teacher"]


class Taught(NamedTuple):
    """A recorded run of the teacher.

    Attributes:
        trace: the teacher's trace.
        noise: the noise of its draws.
        finder: the handler that has found its targets, and what it observes.
        sites: its sites that are compared, by name.
    """

    trace: Trace
    noise: NoiseRecord
    finder: TargetMessenger
    sites: dict[str, Any]

    @classmethod
    def of(cls, trace: Trace, noise: NoiseRecord, finder: TargetMessenger) -> "Taught":
        """A run with the compared sites of a trace."""
        return cls(trace, noise, finder, compared_sites(trace, finder.names))

    def giver(
        self,
        given: Mapping[str, Given],
        site_map: Mapping[str, str],
        replay: CollectingReplayMessenger,
        make: type[GiveMessenger] = GiveMessenger,
    ) -> GiveMessenger:
        """The handler that gives a student values of this run: at the given sites, and at those that the teacher observes."""
        to_student = names_in_student(site_map)
        inputs = {to_student.get(name, name): value for name, value in observed_inputs(self.trace).items()}
        sites = {to_student.get(name, name): self.sites[name] for name in given}
        elements = {to_student.get(name, name): which for name, which in given.items()}
        give = make(sites, elements, inputs, replay)
        give.targets = self.finder.names
        return give


def record_teacher(
    teacher: Program,
    targets: Targets,
    args: Any,
    kwargs: Mapping[str, Any],
    known: ProgramPair,
    target_values: str = "teacher",
    around: Callable[[TargetMessenger], AbstractContextManager[Any]] = nullcontext,
) -> Taught:
    """Run a teacher and record its noise. The teacher does not change, and SVI does not see its parameters.

    Args:
        teacher, targets, args, kwargs, known, target_values: as for :func:`run_pair`.
        around: makes a handler around the recording one, such as one that changes the values of targets, from the handler that finds
            the targets.
    """
    finder = partial(TargetMessenger, targets, target_values == "data")
    if not known.between.looks and not guards.is_active():
        with StreamWatch() as watch:
            taught = _recorded(teacher, finder(), args, kwargs, known, watch, around)
        if not watch.moved:
            return taught
        known.between.looks = True
    return _recorded(teacher, finder(), args, kwargs, known, None, around)


def _recorded(
    teacher: Program,
    finder: TargetMessenger,
    args: Any,
    kwargs: Mapping[str, Any],
    known: ProgramPair,
    watch: StreamWatch | None,
    around: Callable[[TargetMessenger], AbstractContextManager[Any]],
) -> Taught:
    recorder = RecordNeededMessenger(finder, watch, keeps_targets=known.keeps_target_noise)
    with apart(teacher), around(finder), recorder as noise, finder:
        trace = get_trace(teacher, args, kwargs)
    if finder.keeps_data:
        require_data(finder)
    return Taught.of(_constant(trace, teacher), noise, finder)


def replay_teacher(teacher: Program, targets: Targets, args: Any, kwargs: Mapping[str, Any], noise: NoiseRecord) -> Taught:
    """Run a teacher on the noise of an earlier run. Targets without recorded noise are drawn anew."""
    finder = TargetMessenger(targets)
    with apart(teacher), ReplayTeacherMessenger(noise), finder:
        trace = get_trace(teacher, args, kwargs)
    return Taught.of(_constant(trace, teacher), noise, finder)


@contextmanager
def apart(teacher: Program) -> Iterator[None]:
    """Run a teacher inside the context without changing it, and unseen by SVI."""
    with (
        torch.no_grad(),
        nullcontext() if is_frozen(teacher) else evaluation_mode(teacher),
        poutine.block(hide_types=["param"]) if am_i_wrapped() else nullcontext(),
    ):
        yield


def _constant(trace: Trace, teacher: Program) -> Trace:
    frozen = unwrap(teacher)
    runs_without_autograd = isinstance(frozen, FrozenProgram) and not frozen.differentiates
    return trace if runs_without_autograd else without_history(trace)
