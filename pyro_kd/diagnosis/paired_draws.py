"""Draws of teacher and student side by side, on shared noise that includes the noise of the targets.

In a loss, the student is given the teacher's targets, so targets share no noise. Here, the two programs are viewed as samplers: the
student draws its own targets, on the noise of the teacher's targets. Each draw also has the terms of the loss.
Input of :mod:`pyro_kd.diagnosis.inference_data`; knows programs and losses, but no arrays.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_kd.errors import UnsupportedNoiseError
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.isolation.programs import require_callable
from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.evaluation import Evaluator
from pyro_kd.losses.giving import CANNOT_SHARE, GiveMessenger, RecordNeededMessenger
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.losses.program_pair import ProgramPair
from pyro_kd.losses.recording import Taught
from pyro_kd.losses.targets import TargetMessenger
from pyro_kd.losses.terms import SiteTerm
from pyro_kd.noise.messengers import ReplayNoiseMessenger, SampleMessenger
from pyro_kd.noise.samplers import draws_nothing
from pyro_kd.sites.categories import recoded_value
from pyro_kd.sites.classification import observed_inputs
from pyro_kd.sites.pairing import names_in_student
from pyro_kd.sites.plates import row_numbers
from pyro_kd.sites.tracing import get_trace

__all__ = ["PairedDraw", "paired_draws", "single_particle"]

Program = Callable[..., Any]


class PairedDraw(NamedTuple):
    """One draw of both programs.

    Attributes:
        teacher: trace of the teacher; targets are drawn, also where the call observes them.
        student: trace of the student on the teacher's noise, with its own targets.
        terms: the terms of the loss, from a run in which the student is given the values that the loss gives it. With
            ``target_values="data"`` that is a run of its own, since the draw above has other targets.
        targets: the teacher's names of the targets.
        data: values at the sites that the teacher observes in the call, targets included.
        undrawn: the student's names of targets whose family has no sampler in the student: they have the teacher's values.
    """

    teacher: Trace
    student: Trace
    terms: list[SiteTerm]
    targets: list[str]
    data: dict[str, Any]
    undrawn: list[str]


def single_particle(loss: DistillationLoss) -> DistillationLoss:
    """A copy of a loss that runs each program once.

    Raises:
        TypeError: the argument is not a distillation loss.
    """
    if not isinstance(loss, DistillationLoss):
        raise TypeError(
            f"the first argument must be a distillation loss, such as SurrogateKD(targets=['x']), not {type(loss).__name__}; "
            "student and teacher follow it."
        )
    single = copy.copy(loss)
    single.num_particles, single.vectorize_particles = 1, False
    return single


def paired_draws(
    loss: DistillationLoss,
    student: Program,
    teacher: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int,
) -> Iterator[PairedDraw]:
    """Run both programs ``num_samples`` times, in eval mode, without gradients, and hidden from outer handlers.

    Plates that subsample keep the rows of the first draw.
    """
    single = single_particle(loss)
    require_callable(student, "the student (second argument)")
    require_callable(teacher, "the teacher (third argument)")
    evaluator = Evaluator(single, ProgramPair(student, teacher))
    to_student = names_in_student(loss.site_map)
    rows: dict[str, Tensor] = {}
    for _ in range(num_samples):
        finder = TargetMessenger(loss.targets)
        record = functools.partial(_record_teacher, finder, _RowsMessenger(rows))
        student_rows = {to_student.get(name, name): value for name, value in rows.items()}
        student_rows = {name: value for name, value in student_rows.items() if name not in loss.fresh}
        with evaluation_mode(student), poutine.block():
            evaluator.look_at_latents(args, kwargs)
            held = _RowsMessenger(student_rows)(student)
            run, terms = evaluator.particle(args, kwargs, report=True, keep_noise=True, student=held, record=record)
            if "student_fraction" in loss.schedulable:  # the terms are of a run on the student's history
                terms = evaluator.particle(args, kwargs, report=True, student=held).terms
            elif loss.target_values == "data":  # the run above has drawn the targets
                record = functools.partial(_record_teacher, TargetMessenger(loss.targets, True), _RowsMessenger(rows))
                terms = evaluator.particle(args, kwargs, report=True, student=held, record=record).terms
            free, undrawn = _run_freely(loss, run, list(finder.names), _RowsMessenger(student_rows)(student), args, kwargs)
        nodes: Any = run.teacher.nodes
        rows = {name: site["value"] for name, site in nodes.items() if _draws_rows(site)}
        data = {name: site.value for name, site in finder.observed.items()}
        yield PairedDraw(run.teacher, free, terms, list(finder.names), data, undrawn)


def _draws_rows(site: Any) -> bool:
    """Whether a site is a plate that subsamples."""
    is_plate = site["type"] == "sample" and site_is_subsample(site)
    return is_plate and not draws_nothing(site["fn"]) and row_numbers(site) is not None


def _record_teacher(
    finder: TargetMessenger,
    held: "_RowsMessenger",
    teacher: Program,
    targets: Any,
    args: Any,
    kwargs: Any,
    known: Any,
    target_values: str = "teacher",
) -> Taught:
    """Record a teacher with the noise of its targets, which a loss does not need."""
    with evaluation_mode(teacher), _RecordTargetsMessenger(finder) as noise, finder, held:
        return Taught.of(get_trace(teacher, args, kwargs), noise, finder)


def _run_freely(
    loss: DistillationLoss, run: PairedRun, targets: list[str], student: Program, args: Any, kwargs: Any
) -> tuple[Trace, list[str]]:
    """Run the student on the noise of a run, with its own targets. Returns its trace, and the targets that it cannot draw."""
    to_student = names_in_student(loss.site_map)
    inputs = {to_student.get(name, name): value for name, value in observed_inputs(run.teacher).items()}
    drawn: dict[str, Any] = {to_student.get(name, name): run.teacher.nodes[name] for name in targets}
    replay = _ReplayWherePossibleMessenger(run, loss, drawn)
    with replay, GiveMessenger({}, {}, inputs, replay), TargetMessenger(list(drawn)):
        return get_trace(student, args, kwargs), replay.undrawn


class _RecordTargetsMessenger(RecordNeededMessenger):
    """Record the noise of all targets, where their families can record it."""

    def _skips(self, msg: Message[..., Any]) -> bool:
        return False


class _ReplayWherePossibleMessenger(ReplayNoiseMessenger):
    """Share noise where possible. A target of a different family, or a site on a different path, draws its own.

    Args:
        run: the run whose noise is replayed.
        loss: the loss, which defines how sites are mapped and which are fresh.
        stand_ins: the teacher's target sites, by the student's names.

    Attributes:
        undrawn: the student's names of targets that its families cannot draw; they have the teacher's values.
    """

    def __init__(self, run: PairedRun, loss: DistillationLoss, stand_ins: Mapping[str, Any]) -> None:
        super().__init__(run.noise, loss.site_map, loss.fresh)
        self._stand_ins = stand_ins
        self.undrawn: list[str] = []

    def _sample(self, msg: Message[..., Any]) -> None:
        try:
            super()._sample(msg)
        except CANNOT_SHARE:
            msg["value"] = None
        if msg["value"] is None and not msg["is_observed"] and not msg["done"] and not draws_nothing(msg["fn"]):
            self._draw_alone(str(msg["name"]), msg)

    def _draw_alone(self, name: str, msg: Message[..., Any]) -> None:
        """Draw without shared noise. Where the family has no sampler, take the teacher's value."""
        try:
            self._draw(name, self._broadcast(msg), msg)
        except UnsupportedNoiseError:
            if name not in self._stand_ins:
                raise
            site = self._stand_ins[name]
            msg["value"] = recoded_value(site["value"], site["fn"], msg["fn"])
            self.undrawn.append(name)


class _RowsMessenger(SampleMessenger):
    """Give plates that subsample their rows."""

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.rows = rows

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        if site_is_subsample(msg) and msg["value"] is None and msg["name"] in self.rows:
            msg["value"] = self.rows[str(msg["name"])]
