"""How far a training run has come, and its way into a checkpoint and back."""

import copy
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_kd.errors import ArchitectureMismatchError, CheckpointError, RunMismatchError
from pyro_kd.training.batches import BatchStream, Place
from pyro_kd.training.checkpoint_values import keys_of, place_keys_of
from pyro_kd.training.checkpoints import Checkpoint
from pyro_kd.training.fingerprint import differences
from pyro_kd.training.history import History
from pyro_kd.training.kept_draws import Kept, draws_key, pools_of
from pyro_kd.training.objectives import Objective
from pyro_kd.training.optimisers import Adapter
from pyro_kd.training.parameters import ProgramState
from pyro_kd.utils.randomness import RandomState

__all__ = ["Progress", "load_checkpoint", "make_checkpoint"]


@dataclass
class Progress:
    """What a training run has done.

    Attributes:
        num_steps: number of optimisation steps.
        history: what was measured at each step.
        best: the best validation loss of the current fit, and the tensors that had it.
        stale: number of validations since then.
        begin: the number of steps that were done when the current fit began.
        run: identifier of the run, which its checkpoints carry.
        loss_scale: the state of the factor of float16 losses, where there is one.
    """

    num_steps: int = 0
    history: History = field(default_factory=History)
    best: tuple[float, dict[str, Tensor]] | None = None
    stale: int = 0
    begin: int = 0
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    loss_scale: dict[str, Any] | None = None

    def begin_fit(self) -> None:
        """Begin a fit here, which has no best validation yet."""
        self.begin, self.best, self.stale = self.num_steps, None, 0

    def note_new(self, student: ProgramState) -> None:
        """Note tensors that were made after the best validation, as they are made: there, the student had them so."""
        if self.best is not None:
            values = self.best[1]
            values |= {name: tensor for name, tensor in student.values().items() if name not in values}

    def note_validation(self, value: float, tensors: Callable[[], dict[str, Tensor]], *, min_delta: float) -> None:
        """Note a validation loss, and keep the tensors where it is the best so far.

        Args:
            value: the loss.
            tensors: returns copies of the current tensors by name.
            min_delta: smallest decrease that counts as an improvement.
        """
        if self.best is None or value < self.best[0] - min_delta:
            self.best, self.stale = (value, tensors()), 0
        else:
            self.stale += 1


def make_checkpoint(
    progress: Progress,
    student: ProgramState,
    optimiser: Adapter,
    fingerprint: dict[str, str],
    processes: Sequence[tuple[Place, Kept]],
) -> Checkpoint:
    """Everything that a run needs to resume as if it had not stopped.

    Args:
        progress, student, optimiser, fingerprint: of the run, in its first process.
        processes: where each process stands in its batches, and its draws of the teacher that serve several steps.
    """
    values: dict[str, Any] = {
        "begin": progress.begin,
        "best": None if progress.best is None else progress.best[0],
        "stale": progress.stale,
        "columns": list(progress.history),
        "constraints": student.constraints(),
        "optimiser": optimiser.name,
        "fingerprint": fingerprint,
    }
    if len(processes) > 1:
        values["processes"] = len(processes)
    if progress.loss_scale is not None:
        values["loss_scale"] = progress.loss_scale
    history = progress.history.items()
    tensors = {f"history/{name}": torch.tensor(column, dtype=torch.float64) for name, column in history}
    for rank, (place, (draws, draw_tensors)) in enumerate(processes):
        values[draws_key(rank)] = draws
        tensors |= draw_tensors
        values |= zip(place_keys_of(rank), (place.taken, place.order), strict=True)
        for key, state in zip(keys_of(rank), (place.now, place.epoch_start), strict=True):
            values[key] = None if state is None else {"python": state.python, "numpy": state.numpy}
            tensors |= {} if state is None else {f"{key}/{name}": tensor for name, tensor in state.tensors.items()}
    if progress.best is not None:
        tensors |= {f"best/{name}": tensor for name, tensor in progress.best[1].items()}
    return Checkpoint(progress.num_steps, student.values(), tensors, optimiser.state_dict(), values, progress.run)


def load_checkpoint(
    saved: Checkpoint,
    student: ProgramState,
    optimiser: Adapter,
    stream: BatchStream,
    fingerprint: dict[str, str],
    objectives: Mapping[str, Objective],
    *,
    allow_changes: bool,
    rank: int = 0,
    size: int = 1,
    device: Any = None,
) -> Progress:
    """Load everything from a checkpoint, random states last.

    Args:
        saved: the checkpoint.
        student, optimiser, stream: what it is loaded into.
        fingerprint: of this run.
        objectives: what is minimised, by name.
        allow_changes: whether the fingerprint in the checkpoint may differ.
        rank, size: the number of this process, and of processes. Where as many have written the checkpoint, each goes on with its
            own random states, batches and draws of the teacher. Otherwise the epoch begins again, the draws are new, and the random
            states are those of the first process.
        device: of this process; None for torch's current one.

    Raises:
        RunMismatchError: teacher, loss or data differ from those of the checkpoint; nothing is changed.
        ArchitectureMismatchError: tensors or constraints differ from those of the student; nothing is changed.
        CheckpointError: the optimiser differs; nothing is changed.
        BatchesExhaustedError: there are fewer batches than were taken; only the random streams are changed.
    """
    values = saved.values
    if values["optimiser"] != optimiser.name:
        theirs, own = values["optimiser"], optimiser.name
        raise CheckpointError(f"{saved.path} was written with {theirs}, and this run has {own}: use the same optimiser.")
    mine, then = student.constraints(), values["constraints"]
    different = [f"{name!r} had {then[name]}, and has {text}" for name, text in mine.items() if then.get(name, text) != text]
    if different:
        raise ArchitectureMismatchError(f"the checkpoint {saved.path} has different constraints: {'; '.join(different)}.")
    student.check_fits(saved.student, f"the checkpoint {saved.path}")
    best = None if values["best"] is None else (values["best"], _part(saved, "best/"))
    if best is not None:
        student.check_fits(best[1], f"the best student in {saved.path}", partly=True)
    _check_generators(saved, stream)
    is_same_size = values.get("processes", 1) == size
    shared_out = () if is_same_size else ("data: batches",)
    changes = differences(_without(values["fingerprint"], shared_out), _without(fingerprint, shared_out))
    if changes and not allow_changes:
        more = f"; and {len(changes) - 10} more" if len(changes) > 10 else ""
        raise RunMismatchError(
            f"the checkpoint {saved.path} belongs to a different run. What differs: {'; '.join(changes[:10])}{more}. Nothing was "
            "trained. Use a different folder; or, to resume all the same: fit(..., resume=True, allow_changes=True)."
        )
    pools = pools_of(objectives, saved, rank=rank, device=device) if is_same_size else {}
    now, epoch_start = (_random_state(saved, key) for key in keys_of(rank if is_same_size else 0))
    taken_key, order_key = place_keys_of(rank if is_same_size else 0)
    order = values.get(order_key, values.get("order"))
    if is_same_size:
        taken = values.get(taken_key, values["batches_taken"])  # once, that of the first process was written alone
        stream.restore(taken, epoch_start, order)
    else:
        # The next batch begins the epoch, each process with noise of its own.
        if now is not None and epoch_start is not None:
            now = now.with_generators_of(epoch_start)
            order = order and [order[0], order[1] - 1]
        stream.restore(0, None, order)
    before = copy.deepcopy(optimiser.state_dict())
    try:
        optimiser.load_state_dict(saved.optimiser)
    except Exception as error:  # of any type: the state is the optimiser's own affair
        optimiser.load_state_dict(before)
        raise CheckpointError(f"the optimiser's state in {saved.path} belongs to different parameters ({error}).") from error
    student.load(saved.student, f"the checkpoint {saved.path}")
    for name, pool in pools.items():
        objectives[name].restore_pool(pool)
    progress = Progress(
        num_steps=saved.step,
        history=History.from_columns({name: saved.tensors[f"history/{name}"].tolist() for name in values["columns"]}),
        best=best,
        stale=values["stale"],
        begin=values["begin"],
        run=saved.run,
        loss_scale=values.get("loss_scale"),
    )
    if now is not None:
        now.restore(stream.generators)
    return progress


def _check_generators(saved: Checkpoint, stream: BatchStream) -> None:
    """Raise CheckpointError where a state does not fit the generator of the batches that has its name."""
    for name, generator in stream.generators.items():
        for key, tensor in saved.tensors.items():
            if key.endswith(f"/generator {name}") and tensor.shape != generator.get_state().shape:
                raise CheckpointError(f"{saved.path} has a random state {key!r} that is none of the batches' generator.")


def _without(texts: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    return {name: text for name, text in texts.items() if name not in names}


def _part(saved: Checkpoint, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in saved.tensors.items() if name.startswith(prefix)}


def _random_state(saved: Checkpoint, key: str) -> RandomState | None:
    state = saved.values[key]
    return None if state is None else RandomState(_part(saved, f"{key}/"), state["python"], state["numpy"])
