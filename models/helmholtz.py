"""The Helmholtz machine with two targets and four binary latent layers.

    z4 -> z3 -> y2 -> z2 -> z1 -> y1

Each z is a vector of binary variables, each arrow a perceptron with one hidden layer, and each y a Gaussian around the
perceptron's output. For the Old Faithful geyser y1 is the duration of an eruption and y2 the waiting time to the next,
both standardised. The second half of the chain depends on the first only through the target y2.

Source: Chen et al., CVPR 2023, section 3.6 and Fig. 4c; Dayan, Hinton, Neal and Zemel, The Helmholtz Machine, 1995.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["HelmholtzMachine"]


class HelmholtzMachine(nn.Module):
    """Generative program :meth:`model` and recognition program :meth:`guide`.

    Sites, all in the plate ``rows``: ``z4``, ``z3``, ``z2``, ``z1`` of event shape (latents,), and ``y2``, ``y1``, scalars.

    Args:
        width: hidden units of each generative perceptron.
        recognition_width: hidden units of each recognition perceptron.
        latents: binary variables in each latent layer.
        scale: standard deviation of the targets given the layer above.
    """

    def __init__(self, width: int, recognition_width: int = 8, latents: int = 2, scale: float = 0.5) -> None:
        super().__init__()
        self.scale = scale
        self.generative = nn.ModuleDict(
            {
                "z3": _perceptron(latents, width, latents),
                "y2": _perceptron(latents, width, 1),
                "z2": _perceptron(1, width, latents),
                "z1": _perceptron(latents, width, latents),
                "y1": _perceptron(latents, width, 1),
            }
        )
        self.generative.register_parameter("z4", nn.Parameter(torch.zeros(latents)))
        self.recognition = nn.ModuleDict(
            {
                "z1": _perceptron(2, recognition_width, latents),
                "z2": _perceptron(latents + 1, recognition_width, latents),
                "z3": _perceptron(1, recognition_width, latents),
                "z4": _perceptron(latents, recognition_width, latents),
            }
        )

    def model(self, num_rows: int, y1: Tensor | None = None, y2: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Generate rows, or score y1 and y2 of shape (num_rows,). Returns y1, y2."""
        net = self.generative
        pyro.module("helmholtz", net)
        with pyro.plate("rows", num_rows):
            z4 = pyro.sample("z4", dist.Bernoulli(logits=net.z4).to_event(1))
            z3 = pyro.sample("z3", dist.Bernoulli(logits=net["z3"](z4)).to_event(1))
            y2 = pyro.sample("y2", dist.Normal(net["y2"](z3).squeeze(-1), self.scale), obs=y2)
            z2 = pyro.sample("z2", dist.Bernoulli(logits=net["z2"](y2.unsqueeze(-1))).to_event(1))
            z1 = pyro.sample("z1", dist.Bernoulli(logits=net["z1"](z2)).to_event(1))
            y1 = pyro.sample("y1", dist.Normal(net["y1"](z1).squeeze(-1), self.scale), obs=y1)
        return y1, y2

    def guide(self, num_rows: int, y1: Tensor, y2: Tensor) -> None:
        """Infer the latents of rows y1 and y2, of shape (num_rows,).

        Its factors have the independence of the true posterior: given y2, the pair z4, z3 is independent of z2, z1.
        """
        net = self.recognition
        pyro.module("helmholtz_recognition", net)
        with pyro.plate("rows", num_rows):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=net["z1"](torch.stack([y1, y2], -1))).to_event(1))
            pyro.sample("z2", dist.Bernoulli(logits=net["z2"](torch.cat([z1, y2.unsqueeze(-1)], -1))).to_event(1))
            z3 = pyro.sample("z3", dist.Bernoulli(logits=net["z3"](y2.unsqueeze(-1))).to_event(1))
            pyro.sample("z4", dist.Bernoulli(logits=net["z4"](z3)).to_event(1))


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
