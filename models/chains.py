"""Toy chains whose laws are known: a teacher given by a formula, a student with one small network per layer.

    z_1 -> z_2 -> ... -> z_L -> y

Three families, whose teachers and students differ in :meth:`Chain.transition` alone; :class:`BlockStudent` is shorter:

- continuous: z_1 ~ U[-1, 1], z_{i+1} ~ N(sign(z_i) |z_i|^1.1, 0.01), with 0.01 as the variance;
- binomial: z_{i+1} ~ Binomial(1000, (z_i / 1000)^1.2), with z_1 / 1000 ~ U[0, 1]. The paper states z_1 ~ U[0, 1]. Taken literally,
  such a chain starts within a thousandth of its range. After a few layers it is at 0, which it never leaves;
- bits: each state is a vector of bits, and the logits of its bits are a perceptron of the state before. z_1 has fair bits. Teacher
  and student have perceptrons of different widths.

Each state depends only on the one before it, so the law of y is a product of transition matrices.

Source: Chen et al., CVPR 2023, section 3.3 and Fig. 2; Fig. 5.
"""

from abc import abstractmethod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["BinomialChain", "BinomialStudent", "BitChain", "BlockStudent", "Chain", "NormalChain", "NormalStudent"]


class Chain(nn.Module):
    """A Markov chain as a Pyro program, :meth:`model`.

    Sites, all scalars in the plate ``rows``: the latents ``z_1`` to ``z_L``, and the target ``y``, the last state.

    Args:
        layers: number L of transitions.
        low, high: ends of the interval on which z_1 is uniform; kept on the module's device.
    """

    def __init__(self, layers: int, low: float, high: float) -> None:
        super().__init__()
        self.layers = layers
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))

    def start(self) -> Any:
        """Distribution of z_1, with batch shape ()."""
        return dist.Uniform(self.low, self.high)

    @abstractmethod
    def transition(self, layer: int, z: Tensor) -> Any:
        """Distribution of the state after transition ``layer``, which counts from 0, given the state z before it.

        Its batch shape is the shape of z.
        """

    def model(self, num_rows: int, y: Tensor | None = None) -> Tensor:
        """Generate rows, or score y of shape (num_rows,). Returns y."""
        pyro.module("chain", self)
        with pyro.plate("rows", num_rows):
            z = pyro.sample("z_1", self.start())
            for layer in range(self.layers - 1):
                z = pyro.sample(f"z_{layer + 2}", self.transition(layer, z))
            return pyro.sample("y", self.transition(self.layers - 1, z), obs=y)


class NormalChain(Chain):
    """The continuous teacher: N(sign(z) |z|^power, scale^2). It has no parameters.

    Args:
        layers: number of transitions.
        power: exponent of the absolute value.
        scale: standard deviation of each transition.
    """

    def __init__(self, layers: int, power: float = 1.1, scale: float = 0.1) -> None:
        super().__init__(layers, -1.0, 1.0)
        self.power, self.scale = power, scale

    def transition(self, layer: int, z: Tensor) -> Any:
        return dist.Normal(z.sign() * z.abs() ** self.power, self.scale)


class NormalStudent(Chain):
    """The continuous student: N(z + network_i(z), scale_i^2), with a network and a scale for each layer.

    Args:
        layers: number of transitions.
        width: hidden units of each network.
        scale: standard deviation of each transition.
        learn_scale: whether the scale is learned, starting at this value; each layer has one scale for all inputs.
        identity: whether each network starts at 0, so that each layer starts at the identity; else as torch initialises it.
    """

    def __init__(
        self, layers: int, width: int = 4, scale: float = 0.1, *, learn_scale: bool = False, identity: bool = False
    ) -> None:
        super().__init__(layers, -1.0, 1.0)
        self.networks = nn.ModuleList([_network(width, identity) for _ in range(layers)])
        log_scale = torch.full((layers,), scale).log()
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def transition(self, layer: int, z: Tensor) -> Any:
        return dist.Normal(z + _apply(self.networks[layer], z), self.log_scale[layer].exp())


class BlockStudent(NormalStudent):
    """A shorter continuous student: each of its transitions replaces a block of a longer chain's, whose noise is its input.

    The transition is N(z + network_i(z, e_1, ..., e_{block - 1}), scale_i^2) with standard normal e. Latents have the names of the
    longer chain's at the end of a block: with a block of 4, ``z_1``, ``z_5``, ``z_9``, ... The inputs are the latents ``noise_2``,
    ``noise_3``, ``noise_4``, ``noise_6``, ..., numbered by the states of the longer chain that they stand for.

    Args:
        layers: number of transitions.
        block: transitions of the longer chain that one transition replaces, at least 2.
        width, scale, identity: as for :class:`NormalStudent`; the scale is learned.
    """

    def __init__(self, layers: int, block: int, width: int = 8, scale: float = 0.1, *, identity: bool = False) -> None:
        super().__init__(layers, width, scale, learn_scale=True)
        self.block = block
        self.networks = nn.ModuleList([_network(width, identity, inputs=block) for _ in range(layers)])

    def transition(self, layer: int, z: Tensor, noise: Tensor | None = None) -> Any:
        """As for :class:`Chain`, with the noise of the block in a last dimension of size block - 1 to the right of the shape of z."""
        assert noise is not None
        inputs = torch.cat([z.unsqueeze(-1).expand(*noise.shape[:-1], 1), noise], -1)
        return dist.Normal(z + self.networks[layer](inputs).squeeze(-1), self.log_scale[layer].exp())

    def model(self, num_rows: int, y: Tensor | None = None) -> Tensor:
        """Generate rows, or score y of shape (num_rows,). Returns y."""
        pyro.module("chain", self)
        with pyro.plate("rows", num_rows):
            z = pyro.sample("z_1", self.start())
            for layer in range(self.layers):
                first, is_last = layer * self.block + 1, layer == self.layers - 1
                standard = dist.Normal(torch.zeros_like(self.low), 1.0)
                noise = [pyro.sample(f"noise_{first + k}", standard) for k in range(1, self.block)]
                fn = self.transition(layer, z, torch.stack([e.expand(num_rows) for e in noise], -1))
                z = pyro.sample("y" if is_last else f"z_{first + self.block}", fn, obs=y if is_last else None)
            return z


class BinomialChain(Chain):
    """The discrete teacher: Binomial(count, (z / count)^power). It has no parameters, and hardly ever leaves 0 or ``count``.

    The logit of the probability is kept within +-30, so that densities are finite: from 0 the chain moves once in 10^10 times.

    Args:
        layers: number of transitions.
        count: number of trials.
        power: exponent of the proportion.
    """

    def __init__(self, layers: int, count: int = 1000, power: float = 1.2) -> None:
        super().__init__(layers, 0.0, float(count))
        self.count, self.power = count, power

    def transition(self, layer: int, z: Tensor) -> Any:
        return dist.Binomial(self.count, logits=((z / self.count) ** self.power).logit().clamp(-30.0, 30.0))


class BinomialStudent(Chain):
    """The discrete student: Binomial(count, sigmoid(l + network_i(l))), where l is the logit of (z + 1/2) / (count + 1), finite at 0.

    Args:
        layers: number of transitions.
        count: number of trials.
        width: hidden units of each network.
        identity: as for :class:`NormalStudent`.
    """

    def __init__(self, layers: int, count: int = 1000, width: int = 4, *, identity: bool = False) -> None:
        super().__init__(layers, 0.0, float(count))
        self.count = count
        self.networks = nn.ModuleList([_network(width, identity) for _ in range(layers)])

    def transition(self, layer: int, z: Tensor) -> Any:
        logits = ((z + 0.5) / (self.count + 1)).logit()
        return dist.Binomial(self.count, logits=logits + _apply(self.networks[layer], logits))


class BitChain(Chain):
    """Vectors of bits: Bernoulli(sigmoid(network_i(z))), with a perceptron of one hidden layer for each transition.

    Args:
        layers: number of transitions.
        bits: of each state; z_1, ..., z_L and y have this event shape.
        width: hidden units of each perceptron.
        gain: standard deviation of the weights, times sqrt(inputs), for a teacher; None starts as torch does, for a student.
    """

    def __init__(self, layers: int, bits: int = 4, width: int = 2, gain: float | None = None) -> None:
        super().__init__(layers, 0.0, 1.0)
        self.bits = bits
        self.networks = nn.ModuleList(
            [nn.Sequential(nn.Linear(bits, width), nn.Tanh(), nn.Linear(width, bits)) for _ in range(layers)]
        )
        for part in self.networks.modules() if gain is not None else ():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=gain / part.in_features**0.5)
                nn.init.zeros_(part.bias)

    def start(self) -> Any:
        return dist.Bernoulli(self.networks[0][0].weight.new_full((self.bits,), 0.5)).to_event(1)

    def transition(self, layer: int, z: Tensor) -> Any:
        return dist.Bernoulli(logits=self.networks[layer](2 * z - 1)).to_event(1)


def _network(width: int, identity: bool, inputs: int = 1) -> nn.Sequential:
    last = nn.Linear(width, 1)
    if identity:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), last)


def _apply(network: nn.Module, z: Tensor) -> Tensor:
    out: Tensor = network(z.unsqueeze(-1)).squeeze(-1)
    return out
