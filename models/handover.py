"""A guide hands on what it computes from its draws to the model that runs on these draws.

The guide of a ladder VAE goes down through the model's own networks, so that both compute the same from each draw. When Pyro runs
a model on a guide's draws (``poutine.replay``, in its ELBOs), a site gets the guide's ``infer`` dictionary along with the value. The
guide leaves there what it has computed. Without a guide, or with a different one, the model computes everything itself.
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
        name: name of the site.
        fn: distribution of the site.
        network: all modules that ``compute`` runs, which must have no dropout.
        compute: a function of the draw, which has shape batch_shape + event_shape of ``fn``.
        key: what ``compute`` depends on besides the draw and the network.

    Returns:
        What ``compute`` returns.
    """
    computed: dict[Hashable, tuple[Tensor, Tensor]] = {}
    z = pyro.sample(name, fn, infer={"computed": computed})
    result = compute(z)
    if not (network.training and any(True for _ in network.buffers())):  # each run updates the averages of batch norm
        computed[_state(network, key)] = z, result
    return result


def sample_and_take(name: str, fn: Distribution, network: nn.Module, compute: Computation, key: Hashable = None) -> Tensor:
    """In a model: ``compute(pyro.sample(name, fn))``, or what a guide has handed on.

    The guide's result is used only if it was computed from this very tensor, with the same parameters and the same mode of autograd.
    For a draw that was detached in between, as in reweighted wake-sleep, or replaced, it is computed again.

    Args, Returns: as for :func:`sample_and_hand_on`.
    """
    with _Reader() as reader:
        z = pyro.sample(name, fn)
    draw, result = reader.infer.get("computed", {}).pop(_state(network, key), (None, None))
    return result if draw is z else compute(z)


def _state(network: nn.Module, key: Hashable) -> Hashable:
    return network, key, network.training, torch.is_grad_enabled(), sum(param._version for param in network.parameters())


class _Reader(Messenger):
    """Keeps the ``infer`` dictionary of the site under it."""

    infer: dict[str, Any]

    def _pyro_post_sample(self, msg: Any) -> None:
        self.infer = msg["infer"]
