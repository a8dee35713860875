"""KL annealing: a handler that weights the latents of an ELBO."""

from typing import Any

from pyro_kd.noise.messengers import SampleMessenger
from pyro_kd.noise.statements import is_bookkeeping

__all__ = ["ScaleLatentsMessenger"]


class ScaleLatentsMessenger(SampleMessenger):
    """Scale the log densities of latents, in a model and in its guide.

    Args:
        weight: a number, or a scalar tensor.

    References:
        Bowman et al., Generating Sentences from a Continuous Space, 2016.
    """

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not is_bookkeeping(msg):
            msg["scale"] = msg["scale"] * self.weight
