"""The teacher's draws as a graph, where a draw serves several steps: what draws add to :mod:`pyro_kd.capture`, which knows no losses.

arguments --graph of the teacher's run--> tensors + the structure of the run that was captured = TeacherDraw
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_kd.capture import Capture, Run
from pyro_kd.isolation.freezing import frozen_tensors
from pyro_kd.losses.program_pair import Program
from pyro_kd.losses.teacher_draws import Recording, TeacherDraw, made_by

__all__ = ["CapturedDraws"]


class CapturedDraws:
    """The draws of a teacher for one loss, captured.

    The graph is not compiled, or in the background where the loss is: a draw is made once in several steps, and would not pay for a
    pause of its own.

    Args:
        record: ``f(args, kwargs, recording)`` runs the teacher; see :func:`~pyro_kd.losses.teacher_draws.made_by`.
        teacher: the teacher.
        of: the options of the loss that draws depend on.
        what: a name of the loss, for messages.
        options: those of :meth:`DistillationLoss.compile <pyro_kd.losses.base.DistillationLoss.compile>`.

    Attributes:
        of: these options.
    """

    def __init__(
        self,
        record: Callable[[Any, Any, Recording], None],
        teacher: Program,
        of: tuple[Any, ...],
        what: str,
        options: Mapping[str, Any],
    ) -> None:
        self.of = of
        self._record = partial(made_by, record=record)
        roots = {"teacher": teacher, "options": of}
        kept = {name: options[name] for name in ("background", "max_graphs") if name in options}
        kept |= {} if kept.get("background") else {"backend": None}
        what = f"drawing from the teacher of {what}"
        self._capture = Capture(self._run, self._run_eagerly, roots, what, partial(frozen_tensors, teacher), **kept)

    def __call__(self, args: Any, kwargs: Any) -> TeacherDraw:
        """A draw for these arguments of both programs, from the random streams."""
        outputs = self._capture((), args, kwargs, ())
        if not outputs.is_from_graph:
            draw: TeacherDraw = outputs.notes
            return draw
        if not outputs.is_valid:  # on a GPU, where nobody has waited for the guards yet
            return self._record(args, kwargs)
        return TeacherDraw(outputs.notes, outputs.details)

    def _run(self, tensors: tuple[Tensor, ...], args: Any, kwargs: Any, static: Any) -> Run:
        draw = self._record(args, kwargs)
        device = draw.tensors[0].device if draw.tensors else None
        return Run(torch.zeros((), device=device), draw.tensors, notes=draw.structure, form=draw.structure)

    def _run_eagerly(self, tensors: tuple[Tensor, ...], args: Any, kwargs: Any, static: Any) -> Run:
        draw = self._record(args, kwargs)
        return Run(torch.zeros(()), notes=draw)
