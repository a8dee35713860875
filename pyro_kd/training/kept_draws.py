"""The draws of a teacher that serve several steps, in a checkpoint: seeds and arguments, from which they are made anew.

Also the warning where a draw serves so many steps that the student may learn it by heart.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from pyro_kd.errors import CheckpointError, MissingDeviceError
from pyro_kd.losses.packing import pack, unpack
from pyro_kd.losses.reuse import DrawPool, PooledDraw
from pyro_kd.losses.teacher_draws import StoredTeacher
from pyro_kd.training.checkpoints import Checkpoint
from pyro_kd.training.processes.group import rank_and_size
from pyro_kd.training.structures import UnknownPartError, decoded, encoded
from pyro_kd.utils.devices import require_device
from pyro_kd.utils.warning import warn_once

__all__ = ["MOST_STEPS", "Kept", "draws_key", "kept_draws", "pools_of", "require_storable", "warn_of_few_draws"]

MOST_STEPS = 16
"""More steps than these for each draw bring a warning."""

_END = 1 << 62  # of seeds


Kept = tuple[dict[str, Any], dict[str, Tensor]]
"""The pools of one process: values for JSON, and tensors by name."""


class _HasPool(Protocol):
    @property
    def pool(self) -> DrawPool | None:
        """The draws."""


def draws_key(rank: int) -> str:
    """The name under which the draws of a process are kept."""
    return "draws" if rank == 0 else f"process {rank} draws"


def kept_draws(objectives: Mapping[str, _HasPool], rank: int = 0) -> Kept:
    """The pools of objectives in one process, as values for JSON and tensors on the CPU, by name."""
    values, tensors = dict[str, Any](), dict[str, Tensor]()
    for name, objective in objectives.items():
        pool = objective.pool
        if pool is None:
            continue
        places: list[Any] = []
        for index, place in enumerate(pool.places):
            if place is None:
                places.append(None)
                continue
            structure, found = pack(place.call)
            prefix = f"{draws_key(rank)}/{name}/{index}"
            tensors |= {f"{prefix}/{number}": tensor.cpu().contiguous() for number, tensor in enumerate(found)}
            devices = [tensor.device.type for tensor in found]
            places.append([place.seed, place.uses, _encoded(structure), len(found), devices])
        values[name] = {"reuse": pool.reuse, "count": pool.count, "places": places}
    return values, tensors


def pools_of(
    objectives: Mapping[str, _HasPool], saved: Checkpoint, *, rank: int = 0, device: Any = None
) -> dict[str, DrawPool]:
    """The pools of a process in a checkpoint, by objective.

    Args:
        objectives: by name.
        saved: the checkpoint.
        rank: the number of the process.
        device: where tensors of a GPU are moved to; None for the current one. Tensors of the CPU stay there.

    Raises:
        CheckpointError: they are not as they were written.
    """
    key = draws_key(rank)
    try:
        states = saved.values.get(key, {}).items()
        found = {name: _pool(f"{key}/{name}", state, saved.tensors, device) for name, state in states}
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{saved.path} is damaged: its draws of the teacher are not as they were written.") from error
    return {name: pool for name, pool in found.items() if name in objectives}


def _pool(prefix: str, state: Any, tensors: Mapping[str, Tensor], device: Any) -> DrawPool:
    if type(state["reuse"]) is not int or not 2 <= state["reuse"] <= len(state["places"]):
        raise ValueError(f"{state['reuse']!r} steps for each draw")
    pool = DrawPool(state["reuse"])
    if len(state["places"]) != len(pool.places) or type(state["count"]) is not int or not 0 <= state["count"] < _END:
        raise ValueError("a pool of the wrong size")
    pool.count = state["count"]
    for index, place in enumerate(state["places"]):
        if place is not None:
            seed, uses, structure, count, *more = place
            if not all(type(number) is int and 0 <= number < _END for number in (seed, uses, count)) or uses > pool.reuse:
                raise ValueError("a draw without its numbers")
            (devices,) = more or (["cpu"] * count,)  # an earlier version has noted none
            found = [_placed(tensors[f"{prefix}/{index}/{number}"], devices[number], device) for number in range(count)]
            args, kwargs = unpack(decoded(structure, count), found)
            pool.places[index] = PooledDraw(seed, (tuple(args), dict(kwargs)), uses, is_restored=True)
    return pool


def _placed(tensor: Tensor, kind: Any, device: Any) -> Tensor:
    """A tensor on the kind of device that it was written from, or on the CPU of a machine that has none."""
    if not isinstance(kind, str) or kind == "meta":
        raise ValueError("a draw without its devices")
    if kind == "cpu":
        return tensor
    try:
        return tensor.to(require_device(kind if device is None else device))
    except MissingDeviceError:
        return tensor


def require_storable(args: Any, kwargs: Any) -> None:
    """Raise CheckpointError where a checkpoint could not hold the arguments of a step."""
    _encoded(pack((tuple(args), dict(kwargs)))[0])


def _encoded(structure: Any) -> Any:
    try:
        return encoded(structure)
    except UnknownPartError as error:
        raise CheckpointError(
            f"with reuse a checkpoint holds the arguments of the steps that made the draws, and an argument is or holds a "
            f"{error.what}, which it cannot hold. Pass tensors, numbers, names, and lists or dictionaries of these; or leave out "
            "reuse or checkpoints."
        ) from error


def warn_of_few_draws(loss: Any, teacher: Any, steps: int, told: set[str]) -> None:
    """Warn where each draw of a teacher serves so many steps that the student may learn it by heart.

    Args:
        loss: the loss, for its option ``reuse``.
        teacher: the teacher.
        steps: the number of steps of the fit.
        told: the warnings that were given; added to.
    """
    if isinstance(teacher, StoredTeacher):
        uses = steps * rank_and_size()[1] / max(teacher.num_draws, 1)
        remedy = f"The cache has {teacher.num_draws} draws: write more of them, cache_teacher(..., batches=n)"
    else:
        uses, remedy = float(loss.reuse), "Take a smaller reuse, such as 8"
    if uses > MOST_STEPS:
        text = (
            f"each draw of the teacher serves about {uses:.0f} steps, and the student may learn the draws by heart. The training "
            f"loss does not show that; compare it with evaluate(...) on draws that training has not seen. {remedy}."
        )
        warn_once(text, told)
