"""What a guide computes from its draws, handed on to the model that is run on them.

The guide of a ladder VAE goes down through the model's own networks, so that the two compute the same from each draw. Where Pyro runs
a model on a guide's draws (``poutine.replay``, in its ELBOs), a site gets the guide's ``infer`` dictionary along with the value: in
it, the guide leaves what it has computed. Without a guide, or with another one, the model computes everything itself.
"""

from collections.abc import Callable, Hashable
from typing import Any

import pyro
import torch
from pyro.distributions import Distribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

__all__ = ["sample_and_hand_on", "sample_and_take"]

Computation = Callable[[Tensor], Tensor]


def sample_and_hand_on(
    name: str, fn: Distribution, network: nn.Module, compute: Computation, key: Hashable = None
) -> Tensor:
    """In a guide: ``compute(pyro.sample(name, fn))``.

    Args:
        name: of the site.
        fn: its distribution.
        network: all that ``compute`` runs; without dropout.
        compute: a function of the draw.
        key: what it depends on beside the draw and the network.
    """
    computed: dict[Hashable, tuple[Tensor, Tensor]] = {}
    z = pyro.sample(name, fn, infer={"computed": computed})
    result = compute(z)
    if not (network.training and any(True for _ in network.buffers())):  # batch norm's averages count each run
        computed[_state(network, key)] = z, result
    return result


def sample_and_take(name: str, fn: Distribution, network: nn.Module, compute: Computation, key: Hashable = None) -> Tensor:
    """In a model: the same, unless a guide has handed it on, in autograd's mode of now and with the parameters as they are now.

    Of this very tensor: not of a draw that was detached meanwhile, as reweighted wake-sleep does, or replaced.
    """
    with _Reader() as reader:
        z = pyro.sample(name, fn)
    draw, result = reader.infer.get("computed", {}).pop(_state(network, key), (None, None))
    return result if draw is z else compute(z)


def _state(network: nn.Module, key: Hashable) -> Hashable:
    return network, key, network.training, torch.is_grad_enabled(), sum(param._version for param in network.parameters())


class _Reader(Messenger):
    """Keeps the ``infer`` dictionary of a site."""

    infer: dict[str, Any]

    def _pyro_post_sample(self, msg: Any) -> None:
        self.infer = msg["infer"]
