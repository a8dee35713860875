"""What the processes of a training run do together: meet, fail together, add up gradients, and agree on what must be equal.

A *meeting* is a point at which every process waits for the others: each step has one, and each checkpoint and validation. It begins
with the first flat tensor of gradients (:mod:`pyro_kd.training.processes.gradients`), whose header says what the meeting is for and
whether a process has failed. A process with an error goes to one more meeting, where the others learn of it, wherever they are: so
none waits for one that has given up. Before parameters are known, a meeting is an exchange of objects instead.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import pyro
from torch import Tensor
from torch.nn import Parameter

from pyro_kd import errors
from pyro_kd.errors import ProcessGroupError, ProcessMismatchError, PyroKDError
from pyro_kd.training.parameters import ProgramState
from pyro_kd.training.processes.gradients import FlatGradients, is_overlapping
from pyro_kd.training.processes.group import Group
from pyro_kd.training.processes.mismatches import different_names, different_settings
from pyro_kd.training.processes.seeds import digest_of_streams, seed_of
from pyro_kd.training.processes.sharing import digest_of_rows, share_out

__all__ = ["GO_ON", "Ending", "Meeting", "Processes"]

Value = TypeVar("Value")
_Failure = tuple[str, str]


class Meeting(IntEnum):
    """What a meeting is for."""

    STEP = 1
    VALIDATION = 2
    CHECKPOINT = 3
    END = 4
    START = 5


class Ending(NamedTuple):
    """How a fit is to end after a step, before its last one."""

    interrupted: bool
    stopped: bool


GO_ON = Ending(False, False)


class Processes:
    """The processes of a training run, seen from one of them. A single process does nothing of all this.

    Attributes:
        seed: what the seeds of this run's processes are made from; 0 before :meth:`begin`.
    """

    def __init__(self) -> None:
        self.seed = 0
        self._group: Group | None = None
        self._gradients: FlatGradients | None = None
        self._known: tuple[Tensor, ...] = ()
        self._objectives: tuple[str, ...] = ()
        self._shared: BaseException | None = None  # the last error that all processes know of

    @property
    def group(self) -> Group:
        """The group, which is connected when it is first asked for."""
        if self._group is None:
            self._group = Group()
        return self._group

    @property
    def rank(self) -> int:
        """The number of this process."""
        return self.group.rank

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.group.size

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and calls callbacks."""
        return self.group.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    @property
    def have_agreed(self) -> bool:
        """Whether the parameters are known to be equal in all processes."""
        return self.is_alone or self._gradients is not None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Tell the other processes of an error inside the context, so that they raise one too."""
        if self.is_alone:
            yield
            return
        try:
            yield
        except Exception as error:
            if not self.group.is_lost and not self.is_shared(error):
                with suppress(ProcessGroupError):  # the others are gone, and the error is what matters
                    self._tell(error)
            raise

    def begin(self, seed: int | None) -> None:
        """Begin a fit, and give each process a random stream of its own.

        The first process draws as a single one would. The others' seeds are made from ``seed``, or from the state of the first one's
        stream, and their numbers.

        Args:
            seed: of the fit, or None.
        """
        if self.is_alone:
            return
        self._gradients = None
        common = self.exchange(digest_of_streams() if seed is None else str(seed))[0]
        self.seed = seed_of(common)
        if not self.is_first:
            pyro.set_rng_seed(seed_of(f"{common} process {self.rank}"))
        elif seed is not None:
            pyro.set_rng_seed(seed)

    def part_streams(self) -> None:
        """Give each process but the first a new random stream, where all have that of the first."""
        if not self.is_first:
            pyro.set_rng_seed(seed_of(f"{digest_of_streams()} process {self.rank}"))

    def exchange(self, value: Value) -> list[Value]:
        """The values of all processes by rank. Every process must call this at the same point.

        Raises:
            ProcessGroupError: a different process has failed, or is gone; or the error of that process, if it is one of pyro_kd's.
        """
        if self.is_alone:
            return [value]
        notes = self.group.gather((value, None))
        self._raise_failure([failure for _, failure in notes])
        return [value for value, _ in notes]

    def of_first(self, make: Callable[[], Value]) -> Value:
        """What the first process has made; the others do not make anything."""
        if self.is_alone:
            return make()
        value: Any = self.exchange(make() if self.is_first else None)[0]
        return value

    def agree(
        self,
        settings: Mapping[str, str],
        params: Mapping[str, Tensor],
        state: ProgramState,
        objectives: Sequence[str],
    ) -> None:
        """Make sure that the processes are equal where they must be, and give all of them the first one's parameters.

        Args:
            settings: what must be equal, as texts by name.
            params: what is trained, by name.
            state: everything that the programs train or keep.
            objectives: names of the objectives.

        Raises:
            ProcessMismatchError: something differs.
        """
        if self.is_alone:
            return
        forms = {_label(name, tensor, params): _described(tensor) for name, tensor in {**state.tensors, **params}.items()}
        self._require(different_settings(self.exchange({**settings, **forms})))
        buffers, others = (state.buffers(persistent=kind) for kind in (True, False))
        constants = self._alike([(name, holder[name]) for holder, name in others if not is_overlapping(holder[name])])
        self.group.copy_from_first(list(dict.fromkeys([*state.tensors.values(), *constants])))
        self._objectives = tuple(objectives)
        numbers = len(_HEADER) + len(self._objectives)
        self._gradients = FlatGradients(params, buffers, numbers, self.is_first)
        self._known = tuple(params.values())

    def _alike(self, tensors: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """Those of some tensors, given with their names, that have one form in all processes; the others each has for itself."""
        everywhere = self.exchange([f"{name} {_described(tensor)}" for name, tensor in tensors])
        if any(len(found) != len(tensors) for found in everywhere):
            return []
        return [tensor for (_, tensor), *forms in zip(tensors, *everywhere, strict=True) if len({*forms}) == 1]

    def average(self, params: Mapping[str, Tensor], state: ProgramState, row: dict[str, float], wish: "Ending") -> "Ending":
        """Replace gradients and losses by their means over processes.

        Where parameters were made, replaced, frozen or unfrozen in all of them, they become those of the first process.

        Args:
            params: what is trained, by name.
            state: everything that the programs train or keep.
            row: what was measured in the step.
            wish: how this process wants the fit to end after the step.

        Returns:
            How the fit ends: what any of the processes wants.

        Raises:
            ProcessMismatchError: the processes no longer train the same parameters.
        """
        if self.is_alone:
            return wish
        assert self._gradients is not None
        losses = [row.get(f"loss/{name}", 0.0) for name in self._objectives]
        has_changed = [*map(id, params.values())] != [*map(id, self._known)]
        front = self._gradients.front([*_header(Meeting.STEP, wish, changed=has_changed), row["loss"], *losses])
        numbers, reached = self._meet(Meeting.STEP, front)
        if numbers[_HEADER.index("changed")] > 0:
            self._require(different_names(self.exchange(list(params))))
            self.agree({}, params, state, self._objectives)
            return self.average(params, state, row, wish)
        rest = self._gradients.rest()
        for flat in rest:
            self.group.sum(flat)
        self._gradients.put_back(front, rest, reached, self.size)
        for name, total in zip(
            ("loss", *(f"loss/{name}" for name in self._objectives)), numbers[len(_HEADER) - 1 :], strict=True
        ):
            if name in row:
                row[name] = total / self.size
        terms = {name: value for name, value in row.items() if name.startswith("term/")}
        if terms:
            everywhere = self.exchange(terms)
            for name in dict.fromkeys(name for found in everywhere for name in found):
                row[name] = sum(found.get(name, 0.0) for found in everywhere) / self.size
        return Ending(*(number > 0 for number in numbers[2:4]))

    def meet(self, what: Meeting) -> None:
        """Wait for all processes.

        Raises:
            ProcessGroupError: as for :meth:`exchange`.
            ProcessMismatchError: the processes meet for different reasons.
        """
        if not self.is_alone:
            self._meet(what, self._empty_front(_header(what)))

    def end(self) -> None:
        """Wait for all processes at the end of a fit, so that none goes on where a different one has failed."""
        self.meet(Meeting.END)

    def share_out(self, batches: Any) -> Any:
        """The batches of this process; see :func:`~pyro_kd.training.processes.sharing.share_out`."""
        if self.is_alone:
            return batches
        rows = self.exchange(digest_of_rows(batches))
        if any(found != rows[0] for found in rows):  # the user has shared them out
            return batches
        return share_out(batches, rank=self.rank, size=self.size, seed=self.seed)

    def differing(self, what: Meeting, texts: Mapping[str, str]) -> list[str]:
        """The names whose texts are not equal in all processes, each of which calls this after they have agreed."""
        self.meet(what)
        first, *others = self.exchange(dict(texts))
        return [name for name in first if any(found.get(name) != first[name] for found in others)]

    def mean(self, what: Meeting, value: float) -> float:
        """The mean of a number over processes."""
        if self.is_alone:
            return value
        self.meet(what)
        return sum(self.exchange(value)) / self.size

    def _meet(self, what: Meeting, front: Tensor) -> tuple[list[float], list[bool]]:
        """Add up the first flat tensor, and see whether everyone is well and there for the same reason."""
        assert self._gradients is not None
        self.group.sum(front)
        numbers, reached = self._gradients.read(front)
        kinds, squares, _, _, failed, _ = numbers[: len(_HEADER) - 1]
        if failed > 0:
            self._raise_failure(self.group.gather(None))
        if kinds * kinds != self.size * squares:  # equal numbers, and no others, fulfil this
            raise self._note(
                ProcessMismatchError(
                    f"process {self.rank} of {self.size} is at a {what.name.lower()}, and a different process is not: fits, "
                    "validations and checkpoints must follow each other in the same order in all of them."
                )
            )
        return numbers, reached

    def _empty_front(self, header: list[float]) -> Tensor:
        assert self._gradients is not None
        return self._gradients.front([*header, 0.0, *(0.0 for _ in self._objectives)], is_empty=True)

    def _tell(self, error: Exception) -> None:
        """Go to one more meeting, and report the error there."""
        failure = type(error).__name__, f"{error} (process {self.rank} of {self.size})"
        if self._gradients is None:
            self.group.gather((None, failure))
            return
        self.group.sum(self._empty_front(_header(Meeting.STEP, failed=True)))
        self.group.gather(failure)

    def _raise_failure(self, failures: Sequence[_Failure | None]) -> None:
        """Raise the first error that a process has reported."""
        for failure in failures:
            if failure is not None:
                name, text = failure
                kind = getattr(errors, name, None)
                if isinstance(kind, type) and issubclass(kind, PyroKDError):
                    raise self._note(kind(text))
                raise self._note(ProcessGroupError(f"a different process has failed: {name}: {text}"))

    def _note(self, error: PyroKDError) -> PyroKDError:
        self._shared = error
        return error

    def is_shared(self, error: BaseException | None) -> bool:
        """Whether all processes know of an error, or of the one that it was made from."""
        while error is not None:
            if error is self._shared:
                return True
            error = error.__cause__
        return False

    def _require(self, error: PyroKDError | None) -> None:
        """Raise an error that all processes have come to, if there is one."""
        if error is not None:
            raise self._note(error)


_HEADER = ("kind", "square", "interrupted", "stopped", "failed", "changed", "loss")


def _header(what: Meeting, wish: Ending = GO_ON, *, failed: bool = False, changed: bool = False) -> list[float]:
    return [float(what), float(what) ** 2, *map(float, wish), float(failed), float(changed)]


def _label(name: str, tensor: Tensor, params: Mapping[str, Tensor]) -> str:
    kind = "parameter" if name in params else "frozen parameter" if isinstance(tensor, Parameter) else "buffer"
    return f"{kind} {name!r}"


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
