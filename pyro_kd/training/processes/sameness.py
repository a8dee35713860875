"""What must be equal in all processes of a run, as texts by name: teachers, objectives, optimiser, batches and options."""

import re
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.programs import owners
from pyro_kd.isolation.reaching import Reached
from pyro_kd.training.batches import Call
from pyro_kd.training.fingerprint import digest_of
from pyro_kd.training.objectives import Objective
from pyro_kd.training.optimisers import Adapter
from pyro_kd.training.parameters import ProgramState
from pyro_kd.training.processes.gradients import is_overlapping, is_synchronised
from pyro_kd.training.processes.together import Meeting, Processes

__all__ = ["describe_equal", "share_numbers", "warn_of_constants", "warn_of_different_students"]

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def describe_equal(
    objectives: Mapping[str, Objective],
    optimiser: Adapter,
    trained: Collection[Tensor],
    call: Call,
    options: Mapping[str, Any],
) -> dict[str, str]:
    """What must be equal in all processes.

    Args:
        objectives: by name.
        optimiser: of the run.
        trained: the tensors that are trained, which are not described: each process is given those of the first.
        call: arguments of a step.
        options: further numbers and names.
    """
    found = {"torch": torch.__version__, "pyro": pyro.__version__, "optimiser": optimiser.name}
    found |= {f"optimiser: {name}": _text(value) for name, value in optimiser.defaults.items()}
    found |= {name: _text(value) for name, value in options.items()}
    known = set(trained)
    for name, objective in objectives.items():
        found[f"objective {name!r}"] = _text(objective)
        students = objective.trained_programs
        for role, program in objective.programs.items():
            if not any(program is student for student in students):
                tensors = _tensors_of(program) | objective.stored_constants(call)
                found |= {
                    f"objective {name!r}: the {role}'s {tensor_name!r}": digest_of(tensor)
                    for tensor_name, tensor in tensors.items()
                    if tensor not in known
                }
    return found


def warn_of_constants(processes: Processes, objectives: Mapping[str, Objective], state: ProgramState) -> None:
    """Warn where a tensor that a student reaches, and that is neither a parameter nor a buffer, differs between processes.

    Args:
        processes: of the run.
        objectives: by name.
        state: what is trained and kept.
    """
    if processes.is_alone:
        return
    differ = processes.differing(Meeting.START, _constants_of(objectives, state))
    if differ and processes.is_first:
        warnings.warn(
            f"the student computes with {differ[0]!r}, which differs between the processes and stays so. If it is a constant of the "
            "student, make it a buffer (self.register_buffer), or from one seed; if it is data, pass it as an argument.",
            stacklevel=2,
        )


def share_numbers(processes: Processes, state: ProgramState) -> None:
    """Give all processes the first one's buffers of whole numbers, as a checkpoint keeps them; a step shares the other ones alone.

    Args:
        processes: of the run, which have met.
        state: what is trained and kept.
    """
    if processes.is_alone:
        return
    buffers = [holder[name] for holder, name in state.buffers(persistent=True)]
    numbers = [buffer for buffer in buffers if not (buffer.is_floating_point() or is_overlapping(buffer))]
    forms = processes.exchange([(str(buffer.dtype), tuple(buffer.shape)) for buffer in numbers])
    if all(found == forms[0] for found in forms):  # otherwise each has its own
        processes.group.copy_from_first(numbers)


def warn_of_different_students(processes: Processes, state: ProgramState) -> None:
    """Warn where the processes no longer have the same parameters, or buffers that are not copied from the first in each step.

    Args:
        processes: of the run.
        state: what is trained and kept.
    """
    if processes.is_alone:
        return
    own = {name: tensor for name, tensor in state.tensors.items() if not is_synchronised(tensor)}
    differ = processes.differing(
        Meeting.END, {name: digest_of(tensor) for name, tensor in {**state.trainable, **own}.items()}
    )
    if not differ or not processes.is_first:
        return
    if differ[0] not in own:
        warnings.warn(
            f"parameter {differ[0]!r} is no longer equal in all processes. A callback that changes the student in the first process "
            "alone makes it so: give it in_every_process = True. What is saved is that of the first process.",
            stacklevel=2,
        )
    else:
        warnings.warn(
            f"buffer {differ[0]!r} is not equal in all processes: each has changed its own, and what is saved, and resumed "
            "from, is that of the first. If the student computes with it, make it of floating-point numbers: those are the first "
            "process's after each step.",
            stacklevel=2,
        )


def _constants_of(objectives: Mapping[str, Objective], state: ProgramState) -> dict[str, str]:
    """Digests of the tensors that the trained programs reach beside what is trained and kept, by name."""
    trained = [program for objective in objectives.values() for program in objective.trained_programs]
    known = {*state.tensors.values(), *(holder[name] for holder, name in state.buffers(persistent=False))}
    for objective in objectives.values():
        for program in objective.programs.values():
            if not any(program is student for student in trained):
                known |= Reached(program).all_tensors().keys()  # compared, or refused, as the teacher's
    reached = Reached(*trained).tensors
    return {name: digest_of(tensor) for tensor, name in reached.items() if tensor not in known}


def _tensors_of(program: Callable[..., Any]) -> dict[str, Tensor]:
    """The tensors that a program reaches, by name."""
    frozen = [owner for owner in owners(program) if isinstance(owner, FrozenProgram)]
    names = Reached(frozen[0].program if frozen else program).all_tensors()
    found = {name: tensor for tensor, name in names.items()}
    for index, tensor in enumerate(tensor for owner in frozen for tensor in owner.tensors()):
        if tensor not in names:
            found[f"tensor {index}"] = tensor
    return found


def _text(value: Any) -> str:
    """A value as a text that does not depend on the process."""
    return _ADDRESS.sub("0x", repr(value))[:200]
