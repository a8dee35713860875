"""Where the teacher's part of a share of a loss comes from: a run of the teacher in this step, or a draw that was made before.

arguments --> the same arguments: the teacher runs in the evaluation
          --> a draw of a pool, which serves several steps
          --> a new draw, where a graph is captured of the student alone, since the teacher is on a device of its own
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pyro_kd.isolation.effects import without_effect
from pyro_kd.losses.advising import with_advice
from pyro_kd.losses.captured_draws import CapturedDraws
from pyro_kd.losses.interface import Loss
from pyro_kd.losses.program_pair import Program, ProgramPair
from pyro_kd.losses.reuse import DrawPool, drawn_once
from pyro_kd.losses.teacher_draws import Recording, TeacherDraw, check_detached, draw_in, made_by
from pyro_kd.teachers.on_device import place_of
from pyro_kd.utils.warning import warn_once

__all__ = ["DrawSource"]


class DrawSource:
    """Makes the arguments of shares.

    Args:
        loss: the loss, for its options.
        pair: the two programs, with the pool of draws.
        programs: ``f(args, kwargs)`` returns student and teacher in the form in which they run.
        run: ``f(student, teacher, args, kwargs, record=...)`` runs both.
        num_runs: how many runs of the teacher one share needs.
        is_rerun: says whether gradients are made by running the teacher again.
    """

    def __init__(
        self,
        loss: Loss,
        pair: ProgramPair,
        programs: Callable[[Any, Any], tuple[Program, Program]],
        run: Callable[..., Any],
        *,
        num_runs: int,
        is_rerun: Callable[[], bool],
    ) -> None:
        self.loss = loss
        self._pair = pair
        self._programs = programs
        self._run = run
        self._num_runs = num_runs
        self._is_rerun = is_rerun

    def drawn(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of one share: a draw of the teacher in their place, where one serves several steps or a graph."""
        if draw_in(args) is not None:
            return args, kwargs
        record = partial(made_by, record=self._record)
        if self.loss.reuse > 1 and torch.is_grad_enabled():
            check_detached(args, kwargs, "with reuse", "reuse")
            options = self._options(args, kwargs)
            pair = self._pair
            pair.pool = DrawPool.of(pair.pool, self.loss.reuse, (options, pair.teacher_versions))
            draw = pair.pool.next(args, kwargs, self._captured(options) or record)
            pair.pool.options = (options, pair.teacher_versions)  # a draw may have shown further parameters
            return (draw,), {}
        if self.loss.compile_options is not None and place_of(self._pair.teacher) is not None and self.can_be_drawn:
            check_detached(args, kwargs, "in a compiled loss whose teacher is on a device of its own", "compile")
            return (drawn_once(args, kwargs, record),), {}
        return args, kwargs

    def drawn_aside(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A draw in the place of the arguments, where the loss can take one, for several runs beside the steps, without effect."""
        if draw_in(args) is not None or not self.can_be_drawn:
            return args, kwargs
        with without_effect(self._pair.student):
            return (drawn_once(args, kwargs, partial(made_by, record=self._record)),), {}

    def _captured(self, draws: tuple[Any, ...]) -> Callable[[Any, Any], TeacherDraw] | None:
        """What makes draws by a graph, where the loss is compiled. None where it is not, or the teacher cannot be captured alone."""
        loss, pair = self.loss, self._pair
        if loss.compile_options is None or not loss.runs_teacher_alone or place_of(pair.teacher) is not None:
            return None
        if pair.captured_draws is None or pair.captured_draws.of != draws:
            name, options = type(loss).__name__, loss.compile_options
            pair.captured_draws = CapturedDraws(self._record, pair.teacher, draws, name, options)
        made: Callable[[Any, Any], TeacherDraw] = pair.captured_draws
        return made

    def _options(self, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """What draws depend on besides the arguments of the programs."""
        loss = self.loss
        if loss.vectorize_particles:
            self._programs(args, kwargs)  # which finds out max_plate_nesting
        size = (loss.num_particles, loss.max_plate_nesting) if loss.vectorize_particles else ()
        return loss.targets, loss.target_values, self._num_runs, size

    @property
    def can_be_drawn(self) -> bool:
        """Whether the teacher's part can be made before the student's."""
        return not (self._is_rerun() or self.loss.refuses_draws(stored=False))

    def check_captured(self) -> bool:
        """Whether a loss can be captured where the teacher is on a device of its own.

        Warns:
            UserWarning: it cannot, since a graph has the operations of one device.
        """
        if place_of(self._pair.teacher) is None or self.can_be_drawn:
            return True
        reason = self.loss.refuses_draws(stored=False) or "discrete_gradient='boundary' runs the teacher on changed noise"
        warn_once(
            f"{type(self.loss).__name__} continues without a graph: {reason}, and the teacher is on a device of its own, "
            "which a graph does not reach. Put both on one device, or leave out compile.",
            self._pair.told,
        )
        return False

    @with_advice
    def _record(self, args: Any, kwargs: Any, recording: Recording) -> None:
        """Run the teacher as one share needs it, by means of ``recording``."""
        loss, pair = self.loss, self._pair
        pair.between.begin()
        student, teacher = self._programs(args, kwargs)
        if loss.runs_teacher_alone:
            for _ in range(self._num_runs):
                recording(teacher, loss.targets, args, kwargs, pair, loss.target_values)
        else:
            with torch.no_grad(), without_effect(pair.student):
                for _ in range(self._num_runs):
                    self._run(student, teacher, args, kwargs, record=recording)
        for run in recording.runs:
            pair.note_params(run.trace)
