"""Whether programs are valid with their current parameters: one more run of the objectives, which changes nothing."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pyro_kd.errors import InvalidParameterError, PyroKDError
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.training.batches import Call
from pyro_kd.training.objectives import Objective
from pyro_kd.training.parameters import ProgramState
from pyro_kd.utils.locations import place_of_error
from pyro_kd.utils.randomness import keeping_random_state

__all__ = ["check_validity", "naming_invalid_parameters"]

_VIOLATION = "to satisfy the constraint"


def check_validity(state: ProgramState, objectives: Mapping[str, Objective], call: Call | None, step: int) -> None:
    """Raise where a parameter or a distribution of the programs is not valid, or a loss is not finite.

    The objectives run without gradients, in eval mode and not compiled, under Pyro's and torch's validation where the user has
    not turned it off. Random streams, buffers and parameters stay as they are.

    Args:
        state: the parameters.
        objectives: by name.
        call: arguments of a step; None checks only the parameters.
        step: the step whose weights and schedules apply.

    Raises:
        InvalidParameterError: a parameter, or a parameter of a distribution, is not finite or violates its constraint.
        NonFiniteLossError: a loss is NaN or infinite.
    """
    state.check()
    if call is None:
        return
    programs = [program for objective in objectives.values() for program in objective.trained_programs]
    with keeping_random_state(), evaluation_mode(*programs), naming_invalid_parameters():
        for objective in objectives.values():
            if objective.weight_at(step) != 0:
                objective.evaluate(step, *call)


@contextmanager
def naming_invalid_parameters() -> Iterator[None]:
    """Turn torch's error about a distribution's parameter into one that names the line of the program and the remedy.

    Raises:
        InvalidParameterError: there was such an error.
    """
    try:
        yield
    except ValueError as error:
        if isinstance(error, PyroKDError) or _VIOLATION not in str(error):
            raise
        what = " ".join(str(error).split("Trace Shapes:")[0].split())
        place = place_of_error(error)
        raise InvalidParameterError(
            f"{what}{place and f' ({place})'}. Give the parameter a constraint, pyro.param(..., constraint=constraints.positive), or "
            "use softplus or exp in the program; or lower the learning rate."
        ) from error
