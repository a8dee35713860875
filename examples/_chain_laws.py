"""The law of the last state of a chain, by products of transition matrices, and the KL of two such laws."""

import itertools

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from models.chains import BinomialChain, BinomialStudent, BitChain, NormalChain, NormalStudent

__all__ = ["binomial_law", "bit_law", "kl_of_laws", "normal_law", "quadrature"]


def quadrature(low: float, high: float, points: int = 400) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes on an interval, and weights that add up to 1: the mean of a smooth function on it.

    Returns:
        Nodes and weights, both of shape (points,).
    """
    nodes, weights = (torch.tensor(part) for part in np.polynomial.legendre.leggauss(points))
    return low + (high - low) * (nodes + 1) / 2, weights / 2


@torch.no_grad()
def normal_law(chain: NormalChain | NormalStudent, points: int = 1601, reach: float = 40.0) -> Tensor:
    """Probabilities of y at the points of a grid from -reach to reach: density times spacing, shape (points,)."""
    grid = torch.linspace(-reach, reach, points, dtype=torch.float64)
    spacing = 2 * reach / (points - 1)
    states, law = quadrature(-1.0, 1.0)
    for layer in range(chain.layers):
        density = chain.double().transition(layer, states.unsqueeze(-1)).log_prob(grid).exp()
        states, law = grid, law @ density * spacing
    chain.float()
    return law


@torch.no_grad()
def binomial_law(chain: BinomialChain | BinomialStudent) -> Tensor:
    """Probabilities of y = 0, 1, ..., count, shape (count + 1,)."""
    count = float(chain.count)
    values = torch.arange(chain.count + 1, dtype=torch.float64)
    ways = (
        torch.lgamma(torch.tensor(count + 1, dtype=torch.float64))
        - torch.lgamma(values + 1)
        - torch.lgamma(count - values + 1)
    )
    states, law = quadrature(0.0, count)
    for layer in range(chain.layers):
        logits = chain.double().transition(layer, states).logits.unsqueeze(-1)
        successes = torch.where(values > 0, values * logsigmoid(logits), 0.0)
        failures = torch.where(values < count, (count - values) * logsigmoid(-logits), 0.0)
        states, law = values, law @ (ways + successes + failures).exp()
    chain.float()
    return law


@torch.no_grad()
def bit_law(chain: BitChain) -> Tensor:
    """Probabilities of the 2^bits values of y, shape (2^bits,)."""
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=chain.bits)), dtype=torch.float64)
    law = torch.full((len(states),), 1 / len(states), dtype=torch.float64)
    for layer in range(chain.layers):
        law = law @ chain.double().transition(layer, states.unsqueeze(1)).log_prob(states).exp()
    chain.float()
    return law


def kl_of_laws(p: Tensor, q: Tensor) -> float:
    """KL of two tables of probabilities of shape (states,); a probability in q that rounds to 0 becomes the smallest number."""
    return float((torch.xlogy(p, p) - p * q.clamp_min(1e-300).log()).sum())
