"""The variational information bottleneck: a classifier whose features are a noisy code of the input.

    x -> z -> label

Training keeps of x what the label needs, and little else: it minimises E_q(z|x)[-log p(label | z)] + beta KL(q(z | x) || r(z)), with
r(z) = N(0, I). That is a negative ELBO with r as prior, the encoder as guide and the KL weighted by beta. The program
:meth:`Bottleneck.classify`, p(z | x) p(label | z), is used afterwards, and distilled.

Source: Alemi, Fischer, Dillon and Murphy, Deep Variational Information Bottleneck, 2017, arXiv 1612.00410.
"""

import itertools
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

__all__ = ["Bottleneck"]


class Bottleneck(nn.Module):
    """Three programs of one network: :meth:`classify`, and :meth:`model` with :meth:`guide`, which train it.

    Sites, both in the plate ``rows``: ``z`` of event shape (latents,), a diagonal Gaussian, and ``label``, a category.

    Args:
        inputs: length of x.
        latents: length of z.
        classes: number of labels.
        hidden: widths of the encoder's hidden layers.
    """

    def __init__(self, inputs: int, latents: int = 256, classes: int = 10, hidden: Sequence[int] = (1024, 1024)) -> None:
        super().__init__()
        self.latents = latents
        widths = [inputs, *hidden]
        layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.encoder = nn.Sequential(*layers, nn.Linear(widths[-1], 2 * latents))
        self.decoder = nn.Linear(latents, classes)

    def code(self, x: Tensor) -> dist.TorchDistribution:
        """p(z | x) of rows x of shape (rows, inputs), with standard deviation softplus(network).

        The source has softplus(network - 5). That is so narrow that the KL from a small student's code to its teacher's starts at
        tens of thousands of nats, and such students did not learn.
        """
        loc, raw_scale = self.encoder(x).chunk(2, -1)
        return dist.Normal(loc, softplus(raw_scale) + 1e-4).to_event(1)

    def classify(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """The classifier: draw a code, then a label, or score labels.

        Args:
            x: shape (rows, inputs).
            label: None, or categories of shape (rows,).

        Returns:
            The logits of the labels, shape (rows, classes).
        """
        pyro.module("bottleneck", self)
        with pyro.plate("rows", len(x)):
            return self._label(pyro.sample("z", self.code(x)), label)

    def model(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """The ELBO's model: a code from the prior r(z), then a label. Only the number of rows of x matters."""
        pyro.module("bottleneck", self)
        with pyro.plate("rows", len(x)):
            prior = dist.Normal(torch.zeros(self.latents, device=x.device), 1.0).to_event(1)
            return self._label(pyro.sample("z", prior), label)

    def guide(self, x: Tensor, label: Tensor | None = None) -> None:
        """The ELBO's guide: the encoder, which does not use the label."""
        pyro.module("bottleneck", self)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", self.code(x))

    @torch.no_grad()
    def predict(self, x: Tensor, draws: int) -> Tensor:
        """Log probabilities of the labels for x of shape (rows, inputs); the mean of p(label | z) over ``draws`` draws of z.

        Returns:
            Tensor of shape (rows, classes).
        """
        z = self.code(x).sample((draws,))
        return self.decoder(z).log_softmax(-1).logsumexp(0) - torch.tensor(float(draws), device=x.device).log()

    def _label(self, z: Tensor, label: Tensor | None) -> Tensor:
        logits: Tensor = self.decoder(z)
        pyro.sample("label", dist.Categorical(logits=logits), obs=label)
        return logits
