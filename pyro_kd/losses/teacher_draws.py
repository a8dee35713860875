"""Draws of a teacher that are kept: the arguments of a call, and what the teacher's run on them has left.

    record_teacher --Taught--> TeacherDraw --> the teacher's part of any later evaluation of a loss

A frozen teacher's draw stays true: noise, values and the distributions at its sites. So a draw may stand in the place of the
programs' arguments, as the only argument of a loss. The student then runs on the draw's arguments, and the teacher does not run.
:mod:`pyro_kd.losses.reuse` keeps a few draws in memory, :mod:`pyro_kd.training.teacher_cache` many on disk.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pyro_kd.errors import InvalidProgramError, UnsupportedGradientError
from pyro_kd.losses.kept_runs import KeptRun, keep, taught
from pyro_kd.losses.packing import Structure, owned, pack, unpack
from pyro_kd.losses.program_pair import Program, ProgramPair
from pyro_kd.losses.recording import Taught, record_teacher
from pyro_kd.losses.targets import Targets
from pyro_kd.utils.torch_internals import pytree

__all__ = [
    "Recording",
    "StoredTeacher",
    "TeacherDraw",
    "call_of",
    "check_detached",
    "check_stored",
    "draw_in",
    "is_plain",
    "made_by",
    "without_program",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]


class TeacherDraw:
    """The arguments of a call, and the teacher's runs on them.

    Attributes:
        structure: everything but the tensors.
        tensors: of any shapes.
    """

    __slots__ = ("_unpacked", "structure", "tensors")

    def __init__(self, structure: Structure, tensors: Sequence[Tensor]) -> None:
        self.structure = structure
        self.tensors = list(tensors)
        self._unpacked: tuple[Any, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.structure, self.tensors)

    def __repr__(self) -> str:
        args, kwargs = self.call
        parts = [*(type(arg).__name__ for arg in args), *kwargs]
        return f"{type(self).__name__}({', '.join(parts)}; {len(self.tensors)} tensors)"

    @property
    def call(self) -> Call:
        """The arguments that the teacher was run on."""
        args, kwargs, _ = self.unpacked
        return args, kwargs

    @property
    def unpacked(self) -> tuple[Any, ...]:
        """Arguments by position and by name, and what :func:`~pyro_kd.losses.kept_runs.keep` has kept of each run."""
        if self._unpacked is None:
            self._unpacked = unpack(self.structure, self.tensors)
        return self._unpacked

    def to(self, device: Any) -> "TeacherDraw":
        """The draw on a device, where its tensors are."""
        moved = [tensor.to(device) for tensor in self.tensors]
        return TeacherDraw(self.structure, moved)

    def pin_memory(self) -> "TeacherDraw":
        """The draw in page-locked memory, for a ``DataLoader``."""
        return TeacherDraw(self.structure, [tensor.pin_memory() for tensor in self.tensors])

    def replay(self) -> "_Replay":
        """What returns the runs of the draw, one after the other, in place of running a teacher."""
        return _Replay(self.unpacked[2])


pytree.register_pytree_node(
    TeacherDraw,
    lambda draw: (draw.tensors, draw.structure),
    lambda tensors, structure: TeacherDraw(structure, list(tensors)),
    serialized_type_name="pyro_kd.TeacherDraw",
)


class StoredTeacher:
    """A teacher that is not in memory. A loss takes it with the draws that it has left, one in the place of the arguments.

    Args:
        identity: what the teacher was, as a short text.
        num_draws: how many draws there are.
    """

    def __init__(self, identity: str, num_draws: int) -> None:
        self.identity = identity
        self.num_draws = num_draws

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise InvalidProgramError: there is no program to run."""
        raise InvalidProgramError(
            "the teacher of a cache is not in memory, and cannot be run on new arguments. Pass a draw of the cache in the place of "
            "the arguments: fit(batches=cache.loader()), loss.loss(student, cache.teacher, cache[0])."
        )


class _TeacherRuns:
    """Base class of what runs a teacher, or replays it, in the place of :func:`~pyro_kd.losses.recording.record_teacher`."""


class Recording(_TeacherRuns):
    """Runs the teacher, and keeps what its runs have left in ``runs``."""

    def __init__(self) -> None:
        self.runs: list[Taught] = []

    def __call__(self, *args: Any, **options: Any) -> Taught:
        """Run the teacher; arguments as for :func:`~pyro_kd.losses.recording.record_teacher`."""
        run = record_teacher(*args, **options)
        self.runs.append(run)
        return run


class _Replay(_TeacherRuns):
    """Returns kept runs, one for each call."""

    def __init__(self, runs: Iterable["KeptRun"]) -> None:
        self._runs = iter(runs)

    def __call__(
        self,
        teacher: Program,
        targets: Targets,
        args: Any,
        kwargs: Mapping[str, Any],
        known: ProgramPair,
        target_values: str = "teacher",
        around: Any = None,
    ) -> Taught:
        kept = next(self._runs, None)
        if kept is None:
            raise InvalidProgramError(
                "a draw of the teacher holds fewer runs than the loss needs: num_particles was smaller when it was made. Draw again."
            )
        if kept.noise.between:
            known.between.looks = True
        return taught(kept, targets, target_values == "data")


def is_plain(record: Callable[..., Any]) -> bool:
    """Whether a teacher is run as it is, or replayed, and not on changed values or for a report."""
    return record is record_teacher or isinstance(record, _TeacherRuns)


def made_by(args: Any, kwargs: Any, record: Callable[[Any, Any, Recording], None]) -> TeacherDraw:
    """A draw of the teacher.

    Args:
        args, kwargs: arguments of the programs. Their tensors are copied, so that nobody else writes to them.
        record: ``f(args, kwargs, recording)`` runs the teacher on these arguments by means of ``recording``.
    """
    args, kwargs = owned((tuple(args), dict(kwargs)))
    recording = Recording()
    record(args, kwargs, recording)
    structure, tensors = pack((args, kwargs, [keep(run) for run in recording.runs]))
    return TeacherDraw(structure, [tensor.detach().clone() for tensor in tensors])  # some are the teacher's own buffers


def without_program(draw: TeacherDraw) -> TeacherDraw:
    """The draw without the parameters of its program."""
    args, kwargs, runs = draw.unpacked
    return TeacherDraw(*pack((args, kwargs, [run._replace(params={}) for run in runs])))


def draw_in(args: Sequence[Any]) -> TeacherDraw | None:
    """The draw that stands in the place of arguments; None where there is none.

    Raises:
        TypeError: there are further arguments.
    """
    draws = [arg for arg in args if isinstance(arg, TeacherDraw)]
    if not draws:
        return None
    if len(args) > 1:
        raise TypeError("a draw of a teacher holds the programs' arguments, and is the only argument of a loss")
    return draws[0]


def call_of(args: Any, kwargs: Any) -> Call:
    """The programs' arguments, also where a draw stands in their place."""
    draw = draw_in(args)
    return (args, kwargs) if draw is None else draw.call


def check_detached(args: Any, kwargs: Any, where: str, option: str) -> None:
    """Raise UnsupportedGradientError where an argument requires a gradient, which a draw of the teacher does not keep.

    Args:
        args, kwargs: arguments of the programs.
        where: when the student runs on the arguments of a draw, in words.
        option: the option to leave out.
    """
    named = [(f"positional argument {number}", value) for number, value in enumerate(args)]
    for name, value in (*named, *((f"argument {name!r}", value) for name, value in kwargs.items())):
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(value)):
            raise UnsupportedGradientError(
                f"{name} requires a gradient, and {where} the student runs on a copy of the arguments that the teacher's draw was "
                f"made with, so that no gradient would reach it. Leave out {option}, or pass the argument detached."
            )


def check_stored(loss: Any, args: Any, needs_rerun: bool) -> None:
    """Raise InvalidProgramError where a loss needs a teacher that is not in memory.

    Args:
        loss: the loss, for its options.
        args: positional arguments of its call.
        needs_rerun: whether gradients are made by running the teacher again.
    """
    reason = loss.refuses_draws(stored=True)
    if draw_in(args) is None:
        reason = "the call has no draw of it, but other arguments"
    elif needs_rerun:
        reason = "discrete_gradient='boundary' runs the teacher on changed noise"
    elif loss.num_particles > 1 or loss.vectorize_particles:
        reason = f"num_particles={loss.num_particles} asks for further draws on the same arguments"
    if reason:
        raise InvalidProgramError(
            f"{type(loss).__name__} needs the teacher, which is not in memory: {reason}. Pass a draw of the cache in the place of "
            "the arguments, fit(batches=cache.loader()), to SurrogateKD or LocalKD with num_particles=1; or load the teacher itself."
        )
