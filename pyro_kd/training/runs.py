"""What makes a training run the run that it is: teachers, losses, weights, and the length of its data, as a fingerprint."""

from pyro_kd.training.batches import BatchStream, Call
from pyro_kd.training.fingerprint import Fingerprint
from pyro_kd.training.stepper import Stepper

__all__ = ["describe_run"]


def describe_run(stepper: Stepper, stream: BatchStream, call: Call) -> dict[str, str]:
    """The fingerprint of a run. What is trained is no part of it.

    Args:
        stepper: objectives, optimiser and options.
        stream: the batches.
        call: the arguments of a step.
    """
    fingerprint = Fingerprint(stepper.state.tensors.values(), stepper.state.modules)
    for name, objective in stepper.objectives.items():
        objective.describe(fingerprint, name, call)
    for key, value in stepper.optimiser.defaults.items():
        if value is not None and value is not False:  # a newer torch has more options, which are off unless they are used
            fingerprint.add(f"optimiser: {key}", value)
    fingerprint.add("scheduler", stepper.scheduler)
    fingerprint.add("accumulate", stepper.accumulate)
    fingerprint.add("clip_norm", stepper.clip_norm)
    if stepper.precision.name != "32-true":
        fingerprint.add("precision", stepper.precision.name)
    return fingerprint.found | stream.description
