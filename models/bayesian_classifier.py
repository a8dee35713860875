"""A Bayesian neural network with one hidden layer that classifies, and the same network with weights that are parameters.

    weights -> label given x

The Bayesian network broadcasts over a batch dimension of its weights, so that each row can have weights of its own.

Source of the priors: Neal, Bayesian Learning for Neural Networks, 1996, chapter 2.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["BayesianClassifier", "Classifier"]


class BayesianClassifier(nn.Module):
    """The Bayesian network.

    Sites: the weights, ``w1`` of event shape (inputs, hidden), ``b1`` of (hidden,), ``w2`` of (hidden, classes) and ``b2`` of
    (classes,); and ``label`` in the plate ``rows``, a category.

    Args:
        inputs: length of x.
        hidden: number of hidden units.
        classes: number of labels.
        scale: standard deviation of the weights times the square root of the number of units they come from.
    """

    scales: Tensor

    def __init__(self, inputs: int, hidden: int, classes: int, scale: float = 2.0) -> None:
        super().__init__()
        self.shapes = {"w1": (inputs, hidden), "b1": (hidden,), "w2": (hidden, classes), "b2": (classes,)}
        self.register_buffer("scales", torch.tensor([scale / inputs**0.5, 1.0, scale / hidden**0.5, 1.0]))

    def forward(self, x: Tensor, label: Tensor | None = None) -> None:
        """Draw weights and labels of x of shape (rows, inputs), or score labels of shape (rows,)."""
        weights = {
            name: pyro.sample(name, dist.Normal(torch.zeros_like(scale), scale).expand(shape).to_event(len(shape)))
            for (name, shape), scale in zip(self.shapes.items(), self.scales, strict=True)
        }
        with pyro.plate("rows", len(x)):
            pyro.sample("label", dist.Categorical(logits=self.logits(x, weights)), obs=label)

    @staticmethod
    def logits(x: Tensor, weights: Any) -> Tensor:
        """The logits of the labels, of shape (rows, classes), or (draws, rows, classes) for weights of shape (draws, 1, ...).

        Args:
            x: shape (rows, inputs).
            weights: tensors by name, with or without a batch shape on the left that broadcasts with the rows.
        """
        hidden = torch.tanh(torch.einsum("...i,...ih->...h", x, weights["w1"]) + weights["b1"])
        return torch.einsum("...h,...hc->...c", hidden, weights["w2"]) + weights["b2"]


class Classifier(nn.Module):
    """One network: the site ``label`` in the plate ``rows``, a category.

    Args:
        inputs: length of x.
        hidden: number of hidden units.
        classes: number of labels.
    """

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes))

    def forward(self, x: Tensor, label: Tensor | None = None) -> None:
        """Draw labels of x of shape (rows, inputs), or score labels of shape (rows,)."""
        pyro.module("classifier", self)
        with pyro.plate("rows", len(x)):
            pyro.sample("label", dist.Categorical(logits=self.net(x)), obs=label)

    def guide(self, x: Tensor, label: Tensor | None = None) -> None:
        """Nothing: the network has no latents."""
