"""Adds to a loss a term whose value is 0, and whose gradient is that through the student's discrete latents."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pyro_kd.errors import UnsupportedGradientError
from pyro_kd.losses.discrete_gradients.boundary import boundary_surrogate
from pyro_kd.losses.discrete_gradients.choice import DiscreteGradients
from pyro_kd.losses.discrete_gradients.rerun import Rerun
from pyro_kd.losses.discrete_gradients.score import score_surrogate
from pyro_kd.losses.paired_run import PairedRun

__all__ = ["NEEDS_ROWS", "RERUNS", "with_discrete_gradients"]

RERUNS = ("boundary", "boundary_all")
"""The gradients that run the programs again."""

NEEDS_ROWS = (*RERUNS, "score")
"""The gradients that need the share of each row in the loss."""


def with_discrete_gradients(
    value: Tensor, particles: Sequence[Any], gradients: DiscreteGradients, loss: Any, rerun: Callable[[], Rerun]
) -> Tensor:
    """The value of a loss, with the gradient that the sites ask for.

    Args:
        value: the loss of the particles, a scalar tensor.
        particles: the particles, with their terms.
        gradients: which site asks for which gradient.
        loss: the loss, for its options.
        rerun: makes what runs the programs again.

    Raises:
        UnsupportedGradientError: a site does not have the gradient, or the loss is not a sum over sites.
    """
    if not gradients.may_be(*NEEDS_ROWS):
        return value
    runs = [(particle.run, {term.name: term.weight for term in particle.terms}) for particle in particles]
    parts = [score_surrogate(runs, gradients, loss)]
    if gradients.may_be(*RERUNS):
        again = rerun()
        for run, weights in runs:
            part = boundary_surrogate(run, weights, gradients, loss, again)
            parts.append(None if part is None else part / len(runs))
    found = [part for part in parts if part is not None]
    if found:
        _require_plain(runs, loss)
    if found and loss.combines_particles:
        raise UnsupportedGradientError(
            f"{type(loss).__name__} combines particles in its own way, and the gradients 'boundary' and 'score' need a weighted sum "
            "of the terms. Use discrete_gradient='implicit' for counts, or 'cut'."
        )
    for part in found:
        value = value + (part - part.detach()).to(value.dtype)
    return value


def _require_plain(runs: Sequence[tuple[PairedRun, Any]], loss: Any) -> None:
    """Raise UnsupportedGradientError where the share of a draw in the loss is not known for these options."""
    obstacle = ""
    if any(isinstance(which, Tensor) for run, _ in runs for which in run.given.values()):
        obstacle = "teacher_forcing that gives some rows of a latent"
    elif "student_fraction" in loss.schedulable:
        obstacle = "targets that the student draws"
    elif loss.target_values != "teacher":
        obstacle = f"target_values={loss.target_values!r}"
    elif loss.latent_form != "conditional":
        obstacle = "latent_form other than 'conditional'"
    if obstacle:
        raise UnsupportedGradientError(
            f"the gradients 'boundary' and 'score' do not go with {obstacle}. Use discrete_gradient='implicit' for counts, or 'cut'; "
            "or leave that option out."
        )
