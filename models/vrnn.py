"""The variational recurrent network of pen movements: drawings and handwriting as sequences of points.

    h_0 = 0;   z_t ~ p(. | h_{t-1});   x_t = (pen_t, move_t) ~ p(. | z_t, h_{t-1});   h_t = LSTM(h_{t-1}, x_t, z_t)

Each point has a movement (dx, dy) from the point before, a Gaussian with a fixed standard deviation, and says whether the pen is
lifted after it, a Bernoulli. The recognition program infers z_t from x_t and h_{t-1}.

Source: Chung et al., A Recurrent Latent Variable Model for Sequential Data, 2015; Chen et al., CVPR 2023, section 3.6 and Fig. 4b.
"""

from contextlib import AbstractContextManager, nullcontext

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

__all__ = ["VRNN"]


class VRNN(nn.Module):
    """Generative program :meth:`model` and recognition program :meth:`guide`.

    Sites, all in the plate ``rows``, for t = 1, ..., length: ``z{t}`` of event shape (latents,), Gaussian; ``pen{t}``, binary, 1
    where the pen is lifted after the point; ``move{t}`` of event shape (2,), the movement (dx, dy), Gaussian around the decoder's
    output.

    The extractors of features, the networks of prior and posterior, and the decoder have two hidden layers each, with ReLU. The
    generative parameters are in ``generative``, those of the guide alone in ``recognition``.

    Args:
        width: hidden units of each layer of the perceptrons.
        recurrent: units of the LSTM.
        latents: length of each z.
        scale: standard deviation of the movements given the decoder's output, in the data's units.
    """

    def __init__(self, width: int, recurrent: int, latents: int = 16, scale: float = 1.0) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.scale = scale
        self.generative = nn.ModuleDict(
            {
                "points": nn.Sequential(*_hidden(3, width)),
                "latents": nn.Sequential(*_hidden(latents, width)),
                "prior": nn.Sequential(*_hidden(recurrent, width), nn.Linear(width, 2 * latents)),
                "decoder": nn.Sequential(*_hidden(width + recurrent, width), nn.Linear(width, 3)),
                "cell": nn.LSTMCell(2 * width, recurrent),
            }
        )
        self.recognition = nn.Sequential(*_hidden(width + recurrent, width), nn.Linear(width, 2 * latents))

    def model(self, num_rows: int, length: int, x: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Generate drawings, or score those of x.

        Args:
            num_rows: number of drawings.
            length: number of points of each.
            x: the points (dx, dy, pen_up), shape (num_rows, length, 3).
            mask: true at points that count, shape (num_rows, length), for shorter drawings. Points that do not count come last; x may
                be anything finite there, with a pen of 0 or 1.

        Returns:
            The points, shape (num_rows, length, 3).
        """
        net = self.generative
        pyro.module("vrnn", net)
        hidden, cell = self._start(num_rows)
        points = []
        with pyro.plate("rows", num_rows):
            for t in range(1, length + 1):
                with _counting(mask, t):
                    z = pyro.sample(f"z{t}", _gaussian(net["prior"](hidden)))
                    features = net["latents"](z)
                    output = net["decoder"](torch.cat([features, hidden], -1))
                    pen, move = dist.Bernoulli(logits=output[:, 0]), dist.Normal(output[:, 1:], self.scale).to_event(1)
                    pen = pyro.sample(f"pen{t}", pen, obs=None if x is None else x[:, t - 1, 2])
                    move = pyro.sample(f"move{t}", move, obs=None if x is None else x[:, t - 1, :2])
                points.append(torch.cat([move, pen.unsqueeze(-1)], -1))
                if t < length:
                    hidden, cell = net["cell"](torch.cat([net["points"](points[-1]), features], -1), (hidden, cell))
        return torch.stack(points, 1)

    def guide(self, num_rows: int, length: int, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Infer z of the drawings x, each z from its point and those before it. Arguments as for :meth:`model`.

        Returns:
            A draw of z, shape (num_rows, length, latents).
        """
        net = self.generative
        pyro.module("vrnn", net)
        pyro.module("vrnn_recognition", self.recognition)
        hidden, cell = self._start(num_rows)
        features = net["points"](x)
        draws = []
        with pyro.plate("rows", num_rows):
            for t in range(1, length + 1):
                with _counting(mask, t):
                    posterior = _gaussian(self.recognition(torch.cat([features[:, t - 1], hidden], -1)))
                    draws.append(pyro.sample(f"z{t}", posterior))
                if t < length:
                    inputs = torch.cat([features[:, t - 1], net["latents"](draws[-1])], -1)
                    hidden, cell = net["cell"](inputs, (hidden, cell))
        return torch.stack(draws, 1)

    def _start(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """The LSTM's state before the first point: zero."""
        zeros = self.generative["cell"].weight_hh.new_zeros(num_rows, self.recurrent)
        return zeros, zeros


def _counting(mask: Tensor | None, t: int) -> AbstractContextManager[object]:
    """A handler that counts only the rows whose drawing has a point t."""
    return nullcontext() if mask is None else poutine.mask(mask=mask[:, t - 1])


def _hidden(inputs: int, width: int) -> list[nn.Module]:
    return [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]


def _gaussian(output: Tensor) -> dist.Distribution:
    """A diagonal Gaussian from its means and log variances side by side."""
    loc, log_variance = output.chunk(2, -1)
    return dist.Normal(loc, (log_variance / 2).exp()).to_event(1)
