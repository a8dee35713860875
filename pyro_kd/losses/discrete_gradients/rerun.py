"""Run both programs once more on noise that was changed at some draws. Knows programs and noise, and no gradients."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine

from pyro_kd.isolation.effects import guarded
from pyro_kd.isolation.modes import on_copied_buffers
from pyro_kd.isolation.reaching import Reached
from pyro_kd.losses.giving import CollectingReplayMessenger
from pyro_kd.losses.paired_run import GivenSites, PairedRun, as_mapping, pair_up, run_student
from pyro_kd.losses.program_pair import Program, ProgramPair
from pyro_kd.losses.recording import replay_teacher
from pyro_kd.losses.targets import Targets
from pyro_kd.noise.laws import Draw
from pyro_kd.noise.record import NoiseRecord

__all__ = ["Rerun", "record_of"]


def record_of(draws: Mapping[str, Iterable[Draw]], changed: Mapping[str, Draw]) -> NoiseRecord:
    """A record of noise, with the first draw of some sites changed."""
    record = NoiseRecord()
    for name, noise in draws.items():
        record.add(name, [changed[name], *[*noise][1:]] if name in changed else noise)
    return record


class Rerun(NamedTuple):
    """The two programs with what is needed to run them once more."""

    student: Program
    teacher: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Targets
    given_sites: GivenSites
    site_map: Mapping[str, str]
    fresh: frozenset[str]
    known: ProgramPair

    def on(self, teacher: NoiseRecord, students: Iterable[NoiseRecord]) -> list[PairedRun]:
        """One run of the teacher, and runs of the student with its targets, without gradients.

        Args:
            teacher: the teacher's noise. It draws its targets anew where theirs is not recorded.
            students: the noise of each run of the student, by the student's names.
        """
        with self._without_traces():
            taught = replay_teacher(self.teacher, self.targets, self.args, self.kwargs, teacher)
            names = taught.finder.names.keys()
            given = as_mapping(self.given_sites(taught.sites, names), taught.sites, names)
            runs = []
            for noise in students:
                replay = CollectingReplayMessenger(noise, {}, ())
                give = taught.giver(given, self.site_map, replay)
                with self.known.autograd_in_student():
                    trace = run_student(self.student, taught, replay, give, self.args, self.kwargs)
                pairs, error = pair_up(taught, trace, replay, give, self.site_map, self.fresh)
                if error is not None:
                    raise error
                guard = partial(guarded, self.teacher, [pair.p for pair in pairs], [pair.q for pair in pairs])
                runs.append(PairedRun(pairs, trace, taught.trace, taught.noise, given, guard))
        return runs

    @contextmanager
    def _without_traces(self) -> Iterator[None]:
        with torch.no_grad(), poutine.block(), on_copied_buffers(Reached(self.student).modules):
            yield
