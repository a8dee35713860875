"""The variational autoencoder of binary vectors: generative program z -> x, recognition program x -> z.

Source: Kingma and Welling, Auto-Encoding Variational Bayes, 2014.
"""

import itertools
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

__all__ = ["VAE"]


class VAE(nn.Module):
    """Generative program :meth:`model` and recognition program :meth:`guide`.

    Sites, both in the plate ``rows``: ``z`` of event shape (latents,), standard normal, and ``x`` of event shape (pixels,), binary.

    Args:
        pixels: length of x.
        latents: length of z.
        hidden: widths of the hidden layers from x to z; the decoder has them in reverse order.
    """

    def __init__(self, pixels: int, latents: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.latents = latents
        self.decoder = _perceptron(latents, *reversed(hidden), pixels)
        self.encoder = _perceptron(pixels, *hidden, 2 * latents)

    def model(self, num_rows: int, x: Tensor | None = None) -> Tensor:
        """Generate rows, or score x of shape (num_rows, pixels). Returns the probabilities of the pixels."""
        pyro.module("vae_decoder", self.decoder)
        with pyro.plate("rows", num_rows):
            prior = dist.Normal(self.decoder[0].weight.new_zeros(self.latents), 1.0).to_event(1)
            logits = self.decoder(pyro.sample("z", prior))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)
        return logits.sigmoid()

    def guide(self, num_rows: int, x: Tensor) -> Tensor:
        """Infer z of rows x, of shape (num_rows, pixels). Returns a draw of z."""
        pyro.module("vae_encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("rows", num_rows):
            return pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def _perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])
