"""What must be equal in all processes of a run, as texts by name: teachers, objectives, optimiser, batches and options."""

import re
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

__all__ = ["describe_equal"]

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
