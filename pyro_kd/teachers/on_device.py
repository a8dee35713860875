"""A teacher on a device of its own, as a program that lives on the student's.

    arguments --to its device--> the teacher --distribution--> to the student's device: sampled and recorded there
                                     ^                                     |
                                     +--------- value, to its device ------+

Each sample statement leaves the teacher's device before any handler sees it. So noise, values and distributions are on the student's
device, and nothing that compares two programs needs to know where the teacher runs.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message, apply_stack
from torch import Tensor, nn

from pyro_kd.errors import InvalidProgramError
from pyro_kd.isolation.freezing import FrozenProgram, freeze, is_frozen
from pyro_kd.isolation.programs import owners
from pyro_kd.isolation.reaching import Reached
from pyro_kd.noise.tape import drawing_on
from pyro_kd.utils.devices import moved, require_device
from pyro_kd.utils.pyro_internals import HANDLER_STACK, BoundPartial
from pyro_kd.utils.tensors import tensors_in

__all__ = ["Place", "on_device", "place_of"]


class Place:
    """Where a teacher runs.

    Args:
        device: its device.
        home: the student's device; None where the arguments say so.
        teacher: the teacher.
    """

    def __init__(self, device: torch.device, home: torch.device | None, teacher: Callable[..., Any]) -> None:
        self.device = device
        self.home = home
        self.teacher = teacher

    def home_of(self, call: Any) -> torch.device:
        """The student's device in a call."""
        if self.home is not None:
            return self.home
        first = next(tensors_in(call), None)
        return torch.get_default_device() if first is None else first.device


def on_device(teacher: Callable[..., Any], device: Any, *, to: Any = None) -> Callable[..., Any]:
    """Run a teacher on a device of its own.

    The result is a program whose arguments, draws and distributions are on the student's device, so that every loss and report takes
    it. The teacher's parameters stay on its own device. Noise is drawn on the student's device: the same seed gives the same
    noise wherever the teacher runs.

    Inside the teacher, the device is torch's default device. So tensors that it makes without naming a device are there.

    Args:
        teacher: the teacher. It is frozen, if it is not yet, and is moved to the device as by ``.to(device)``.
        device: where it runs, such as ``"cuda:1"``.
        to: the student's device; None for that of the first tensor among the arguments of a call, or torch's default device where
            there is none.

    Returns:
        The program. Its arguments may be tensors, numbers, tuples, lists, dictionaries and distributions, of which the tensors on the
        student's device are moved. Other objects are passed on as they are.

    Raises:
        MissingDeviceError: there is no such device.
        InvalidProgramError: in a run, a distribution holds a module or function with tensors on the teacher's device, as that of a
            normalising flow does.

    Example:
        >>> import pyro.distributions as dist, pyro, torch
        >>> from pyro_kd import SurrogateKD
        >>> from pyro_kd.teachers import on_device
        >>> def program(rows, loc):
        ...     with pyro.plate("rows", rows):
        ...         pyro.sample("x", dist.Normal(loc, 1.0))
        >>> gpu = "cuda" if torch.cuda.is_available() else "cpu"
        >>> teacher = on_device(lambda rows: program(rows, 1.0), gpu, to="cpu")
        >>> SurrogateKD(["x"]).loss(lambda rows: program(rows, 0.0), teacher, 100)  # 100 * (1 - 0)^2 / 2
        50.0
    """
    there = require_device(device)
    home = None if to is None else require_device(to, "to")
    place = place_of(teacher)
    if place is not None:
        raise InvalidProgramError(f"the teacher is on a device of its own already, {place.device}: pass the teacher itself")
    if not is_frozen(teacher):
        teacher = freeze(teacher)
    for owner in owners(teacher):
        if isinstance(owner, FrozenProgram):
            owner.to(there)
            owner.stays = True
    return BoundPartial(partial(_run, Place(there, home, teacher), teacher))


def place_of(program: Any) -> "Place | None":
    """Where a program of :func:`on_device` runs, also inside Pyro's handlers; None for any other program."""
    while isinstance(program, BoundPartial):
        parts: tuple[Any, ...] = getattr(program.func, "args", ())
        if parts and isinstance(parts[0], Place):
            return parts[0]
        program = parts[1] if len(parts) > 1 else None
    return None


def _run(where: Place, teacher: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the teacher on its device. Its result comes back, too."""
    home = where.home_of((args, kwargs))
    args, kwargs = moved((args, kwargs), home, where.device)
    with _AtWork(where.device, home) as handler, drawing_on(home), _default_device(where.device):
        result = teacher(*args, **kwargs)
    return moved(result, handler.device, home)


class _AtWork(Messenger):
    """The handler of one run: sends each sample statement of a teacher to the student's device, and its value back."""

    def __init__(self, device: torch.device, home: torch.device) -> None:
        super().__init__()
        self.device = device
        self._home = home
        self._default = torch.get_default_device()

    def _process_message(self, msg: Message[..., Any]) -> None:
        if msg["type"] != "sample":
            return
        sent: Any = msg.copy()
        refuse = partial(_refuse, str(msg["name"]), self.device)
        for part in ("fn", "value", "mask", "scale"):
            sent[part] = moved(sent[part], self.device, self._home, refuse)
        with _outside_of(self), _default_device(self._default):
            apply_stack(sent)
        msg["value"] = moved(sent["value"], self._home, self.device)
        msg["is_observed"] = sent["is_observed"]
        msg["done"] = msg["stop"] = True  # the handlers outside have seen it

    def _postprocess_message(self, msg: Message[..., Any]) -> None:
        pass


@contextmanager
def _outside_of(handler: Messenger) -> Iterator[None]:
    """Take a handler, and those inside of it, off Pyro's stack."""
    index = HANDLER_STACK.index(handler)
    inside = HANDLER_STACK[index:]
    del HANDLER_STACK[index:]
    try:
        yield
    finally:
        HANDLER_STACK[index:] = inside


def _default_device(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if torch.get_default_device() == device else torch.device(device)


def _refuse(site: str, device: torch.device, held: Any) -> None:
    """Raise InvalidProgramError for a part of a distribution that has tensors on a device and cannot be moved.

    Args:
        site: name of the site.
        device: the device.
        held: the part.
    """
    if not isinstance(held, nn.Module) and not callable(held):
        return
    tensors: list[Tensor] = list(Reached(held).all_tensors())
    if any(tensor.device == device for tensor in tensors):
        raise InvalidProgramError(
            f"site {site!r}: its distribution holds a {type(held).__name__} with tensors on {device}, the teacher's device. A module "
            "or function in a distribution cannot be moved to the student's device in each step: put teacher and student on one."
        )
