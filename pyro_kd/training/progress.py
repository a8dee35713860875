"""How far a training run has come, and how that is put into a checkpoint and taken out again."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_kd.errors import ArchitectureMismatchError, CheckpointError
from pyro_kd.randomness import RandomState
from pyro_kd.training.batches import BatchStream
from pyro_kd.training.checkpoints import Checkpoint
from pyro_kd.training.history import History
from pyro_kd.training.optimisers import Adapter
from pyro_kd.training.parameters import ProgramState

__all__ = ["Progress", "load_checkpoint", "make_checkpoint"]


@dataclass
class Progress:
    """What a training run has done.

    Attributes:
        num_steps: optimisation steps.
        history: what was measured at them.
        best: the best validation loss so far, and the tensors that had it.
        stale: validations since then.
    """

    num_steps: int = 0
    history: History = field(default_factory=History)
    best: tuple[float, dict[str, Tensor]] | None = None
    stale: int = 0


def make_checkpoint(
    progress: Progress, student: ProgramState, optimiser: Adapter, stream: BatchStream, configuration: dict[str, Any]
) -> Checkpoint:
    """Everything that a run needs to go on as if it had not stopped."""
    taken, epoch_start = stream.state()
    values: dict[str, Any] = {
        "batches_taken": taken,
        "best": None if progress.best is None else progress.best[0],
        "stale": progress.stale,
        "columns": list(progress.history),
        "constraints": student.constraints(),
        "optimiser": optimiser.name,
        "configuration": configuration,
        "random": None,
        "epoch": None,
    }
    history = progress.history.items()
    tensors = {f"history/{name}": torch.tensor(column, dtype=torch.float64) for name, column in history}
    for key, state in (("random", RandomState.now(stream.generators)), ("epoch", epoch_start)):
        if state is not None:
            values[key] = {"python": state.python, "numpy": state.numpy}
            tensors |= {f"{key}/{name}": tensor for name, tensor in state.tensors.items()}
    if progress.best is not None:
        tensors |= {f"best/{name}": tensor for name, tensor in progress.best[1].items()}
    return Checkpoint(progress.num_steps, student.values(), tensors, optimiser.state_dict(), values)


def load_checkpoint(saved: Checkpoint, student: ProgramState, optimiser: Adapter, stream: BatchStream) -> Progress:
    """Take everything out of a checkpoint again, random states last.

    Raises:
        ArchitectureMismatchError: it holds other tensors than the student, or the same with other constraints; nothing is changed.
        CheckpointError: it is of another optimiser; nothing is changed.
    """
    values = saved.values
    if values["optimiser"] != optimiser.name:
        theirs, mine = values["optimiser"], optimiser.name
        raise CheckpointError(f"{saved.path} was written with {theirs}, and this run has {mine}: use the same.")
    now, then = student.constraints(), values["constraints"]
    other = [f"{name!r} had {then[name]}, and has {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
    if other:
        raise ArchitectureMismatchError(f"the checkpoint {saved.path} has other constraints: {'; '.join(other)}.")
    student.load(saved.student, f"the checkpoint {saved.path}")
    try:
        optimiser.load_state_dict(saved.optimiser)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the optimiser's state in {saved.path} is of other parameters ({error}).") from error
    progress = Progress(
        num_steps=saved.step,
        history=History.from_columns({name: saved.tensors[f"history/{name}"].tolist() for name in values["columns"]}),
        best=None if values["best"] is None else (values["best"], _part(saved, "best/")),
        stale=values["stale"],
    )
    stream.restore(values["batches_taken"], _random_state(saved, "epoch"))
    state = _random_state(saved, "random")
    if state is not None:
        state.restore(stream.generators)
    return progress


def _part(saved: Checkpoint, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in saved.tensors.items() if name.startswith(prefix)}


def _random_state(saved: Checkpoint, key: str) -> RandomState | None:
    state = saved.values[key]
    return None if state is None else RandomState(_part(saved, f"{key}/"), state["python"], state["numpy"])
