r"""The hierarchical (ladder) variational autoencoder of images: a chain of latent layers z5 -> z4 -> z3 -> z2 -> z1 -> x.

Each arrow of the generative program is a stage of residual blocks, and each layer depends only on the one above it. The
recognition program goes up from x through its own stages, and comes down through the generative ones: the posterior of a layer is
the precision-weighted product of what comes from below and of the prior that comes from above.

Source: Sønderby, Raiko, Maaløe, Sønderby and Winther, Ladder Variational Autoencoders, 2016; sizes of Chen et al., CVPR 2023.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, softplus

from models.handover import sample_and_hand_on, sample_and_take

__all__ = ["HierarchicalVAE", "Stage"]

Moments = tuple[Tensor, Tensor]
"""Mean and standard deviation, both of shape (rows, latents, side, side), or (latents, 1, 1) for a standard normal."""


class HierarchicalVAE(nn.Module):
    r"""Generative program :meth:`model` and recognition program :meth:`guide`.

    Sites, all in the plate ``rows``: ``z5`` ... ``z1``, normal, of event shape (latents, side, side), and the image ``x``, normal
    with standard deviation ``scale`` around a mean between 0 and 1, of event shape (channels, size, size). The prior of z5 is
    standard normal. The sides are 1, 2, 4, 8, 16 for images of 32 pixels, and 1, 4, 8, 16, 32 for 64. Other ``sides`` make a VAE of
    as many layers, whose top layer is named by their number.

    Args:
        size: side of the images: 32 or 64.
        width: channels of every hidden layer.
        channels: channels of the images.
        latents: channels of every latent layer.
        scale: standard deviation of x. The default is the paper's, :math:`\sqrt{\beta / 2}` with :math:`\beta = 0.1`, for which
            :math:`\beta` times the negative ELBO is the squared error plus :math:`\beta` times the KL.
        sides: of the latent layers from the top down: 1, then growing powers of 2, up to half the size. None: the five above.
    """

    def __init__(
        self,
        size: int,
        width: int,
        channels: int = 3,
        latents: int = 16,
        scale: float = math.sqrt(0.05),
        sides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.size, self.latents, self.scale = channels, size, latents, scale
        stem = nn.Conv2d(channels, width, 5, stride=2, padding=2)
        sides = _sides(size) if sides is None else tuple(sides)
        if size < 2 or size & (size - 1):
            raise ValueError(f"size must be a power of 2 of at least 2, not {size}: pad or resize the images")
        if sides[0] != 1 or sides[-1] > size // 2 or any(low >= high or high & (high - 1) for low, high in pairwise(sides)):
            raise ValueError(f"sides must be 1, then growing powers of 2 up to {size // 2}, half the size, not {sides}")
        resizes = [0.5] * _doublings(sides[-1], size // 2) or [1.0]
        self._build(width, code=0, first=Stage(width, width, 2 * latents, resizes, stem=stem), sides=sides)

    def _build(
        self, width: int, code: int, first: "Stage", running: bool = True, sides: Sequence[int] | None = None
    ) -> None:
        """Make the stages from x to the top layer, of which the first is given, and those from the top layer to x."""
        sides = _sides(self.size) if sides is None else sides
        moments, between = 2 * self.latents, [_doublings(low, high) for low, high in pairwise(sides)]
        ups = [first, *(Stage(width, width, moments, [0.5] * n, code, running=running) for n in reversed(between))]
        downs = [Stage(self.latents, width, moments, [2.0] * n, code, running=running) for n in between]
        last = [2.0] * _doublings(sides[-1], self.size)
        downs += [Stage(self.latents, width, self.channels, last, code, running=running)]
        self.bottom_up, self.top_down = nn.ModuleList(ups), nn.ModuleList(downs)

    def model(self, num_rows: int, x: Tensor | None = None) -> Tensor:
        """Generate images, or score x of shape (num_rows, channels, size, size). Returns the means of the pixels."""
        pyro.module("top_down", self.top_down)
        with pyro.plate("rows", num_rows):
            return self._generate(self._standard_normal(), x)

    def guide(self, num_rows: int, x: Tensor) -> None:
        """Infer the latents of images x, of shape (num_rows, channels, size, size)."""
        pyro.module("bottom_up", self.bottom_up)
        pyro.module("top_down", self.top_down)
        with pyro.plate("rows", num_rows):
            self._infer(None, x)

    def _generate(self, top: Moments, x: Tensor | None, code: Tensor | None = None, task: int | None = None) -> Tensor:
        prior = top
        for layer, stage in zip(range(len(self.top_down), 0, -1), self.top_down, strict=True):
            fn = dist.Normal(*prior).to_event(3)
            below = sample_and_take(f"z{layer}", fn, stage, partial(_read_out, stage, code), task)
            if layer > 1:
                prior = moments_of(below)
        mean = below.sigmoid()
        pyro.sample("x", dist.Normal(mean, self.scale).to_event(3), obs=x)
        return mean

    def _infer(self, top: Moments | None, x: Tensor, code: Tensor | None = None, task: int | None = None) -> None:
        """Without a learned prior (``top`` is None), the posterior of the top layer is what comes from below."""
        hidden, evidence = x, []
        for stage in self.bottom_up:
            hidden, summary = stage(hidden, code)
            evidence.append(moments_of(summary))
        prior = top
        for layer, stage in zip(range(len(self.top_down), 0, -1), self.top_down, strict=True):
            below = evidence[layer - 1]
            posterior = below if prior is None else _product(below, prior)
            fn = dist.Normal(*posterior).to_event(3)
            if layer > 1:
                prior = moments_of(sample_and_hand_on(f"z{layer}", fn, stage, partial(_read_out, stage, code), task))
            else:
                pyro.sample("z1", fn)

    def _standard_normal(self) -> Moments:
        weight = next(self.top_down.parameters())
        return weight.new_zeros(self.latents, 1, 1), weight.new_ones(self.latents, 1, 1)


class Stage(nn.Module):
    """Residual blocks, two for each change of the resolution, and a 1 x 1 convolution that reads them out.

    Args:
        inputs: channels of the input, without those of the code.
        width: channels of the blocks.
        outputs: channels that are read out.
        resizes: factors of the resolution, one after the other: 0.5 halves it, 2 doubles it.
        code: channels of a code that is the same for all pixels, joined to the input of the first block.
        stem: a module that is applied before the blocks, or None.
        running: whether batch norm keeps running averages for evaluation mode; else it always uses the statistics of the batch.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        outputs: int,
        resizes: Sequence[float],
        code: int = 0,
        stem: nn.Module | None = None,
        running: bool = True,
    ) -> None:
        super().__init__()
        self.stem = nn.Identity() if stem is None else stem
        blocks = list[nn.Module]()
        for index, resize in enumerate(resizes):
            blocks += [Block(width if index else inputs + code, width, resize, running), Block(width, width, 1.0, running)]
        self.blocks = nn.Sequential(*blocks)
        self.read_out = nn.Conv2d(width, outputs, 1, bias=False)

    def forward(self, x: Tensor, code: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The hidden layer, and what is read out of it.

        Args:
            x: shape (rows, inputs, side, side).
            code: shape (rows, code), or None.

        Returns:
            Tensors of shapes (rows, width, resized side, resized side) and (rows, outputs, resized side, resized side).
        """
        x = self.stem(x)
        if code is not None:
            x = torch.cat([x, code[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)
        hidden = self.blocks(x)
        return hidden, self.read_out(hidden)


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and a short cut around them; ``resize`` is the factor of the resolution."""

    def __init__(self, inputs: int, width: int, resize: float, running: bool) -> None:
        super().__init__()
        self.grows = resize > 1
        stride = round(1 / min(resize, 1.0))
        is_same = resize == 1 and inputs == width
        self.short_cut = nn.Identity() if is_same else nn.Conv2d(inputs, width, 1, stride, bias=False)
        self.first = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width, track_running_stats=running)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width, track_running_stats=running)

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape (rows, inputs, side, side) to shape (rows, width, resize * side, resize * side)."""
        short_cut = self.short_cut(x)  # a 1 x 1 convolution, so that it can precede the upsampling
        if self.grows:
            x, short_cut = interpolate(x, scale_factor=2), interpolate(short_cut, scale_factor=2)
        hidden = self.first_norm(self.first(x)).relu()
        return (self.second_norm(self.second(hidden)) + short_cut).relu()


def _sides(size: int) -> tuple[int, ...]:
    """The sides of the five layers, from the top down."""
    if size not in (32, 64):
        raise ValueError(f"size must be 32 or 64, not {size}")
    return (1, *(size // divisor for divisor in (16, 8, 4, 2)))


def _doublings(low: int, high: int) -> int:
    """How often ``low`` is doubled to reach ``high``."""
    return (high // low).bit_length() - 1


def moments_of(summary: Tensor) -> Moments:
    """Mean and standard deviation from a summary of shape (rows, 2 * latents, side, side)."""
    mean, raw = summary.chunk(2, 1)
    return mean, softplus(raw) / math.log(2) + 1e-6


def _read_out(stage: Stage, code: Tensor | None, z: Tensor) -> Tensor:
    return stage(z, code)[1]


def _product(one: Moments, two: Moments) -> Moments:
    """The moments of the normal density that is proportional to the product of two."""
    first, second = one[1].pow(-2), two[1].pow(-2)
    total = first + second
    return (one[0] * first + two[0] * second) / total, total.rsqrt()
