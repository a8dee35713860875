"""What makes a training run the run that it is: teachers, losses, weights, and the length of its data, as a fingerprint."""

from collections.abc import Mapping
from typing import Any

import pyro
from pyro import poutine
from torch import Tensor

from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.losses import DistillationLoss
from pyro_kd.losses.checks import params_of
from pyro_kd.losses.module import owners
from pyro_kd.training.batches import BatchStream, Call
from pyro_kd.training.fingerprint import Fingerprint
from pyro_kd.training.objectives import Objective
from pyro_kd.training.optimisers import Adapter
from pyro_kd.training.parameters import ProgramState
from pyro_kd.utils.randomness import RandomState

__all__ = ["describe_run"]


def describe_run(
    objectives: Mapping[str, Objective],
    state: ProgramState,
    optimiser: Adapter,
    scheduler: Any,
    stream: BatchStream,
    call: Call,
    options: Mapping[str, Any],
) -> dict[str, str]:
    """The fingerprint of a run.

    Args:
        objectives: by name.
        state: what is trained, which is no part of it.
        optimiser: the options that it was made with are.
        scheduler: as the user gave it.
        stream: the batches.
        call: the arguments of a step.
        options: of the trainer.
    """
    fingerprint = Fingerprint(state.tensors.values(), state.modules)
    for name, objective in objectives.items():
        fingerprint.add(f"{name}: loss", objective.loss)
        fingerprint.add(f"{name}: weight", objective.weight)
        fingerprint.add(f"{name}: latent_weight", objective.latent_weight)
        fingerprint.add(f"{name}: arguments", objective.arguments)
        if objective.latent_weight is not None:  # the schedule says what the loss's own attribute is
            fingerprint.found.pop(f"{name}: loss.latent_weight", None)
        if isinstance(objective.loss, DistillationLoss):
            fingerprint.add(f"{name}: teacher", objective.guide)
            for key, tensor in _params(objective.guide, *objective.call(call)).items():
                fingerprint.add(f"{name}: teacher's pyro.param {key.replace('$$$', '.')!r}", tensor)
    for key, value in optimiser.defaults.items():
        if value is not None and value is not False:  # as options of newer versions of torch are, where they are not used
            fingerprint.add(f"optimiser: {key}", value)
    fingerprint.add("scheduler", scheduler)
    for key, value in options.items():
        fingerprint.add(key, value)
    return fingerprint.found | stream.description


def _params(program: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The parameters of a program's ``pyro.param`` statements, from a run that changes nothing; none where it cannot be run."""
    before = RandomState.now()
    if any(isinstance(owner, FrozenProgram) for owner in owners(program)):
        pyro.set_rng_seed(0)  # what it draws may decide which parameters it meets
    try:
        with evaluation_mode(program), poutine.block():
            return params_of(poutine.trace(program).get_trace(*args, **kwargs))
    except Exception:  # the first step will say what is wrong with it
        return {}
    finally:
        before.restore()
