"""The hierarchical variational autoencoder for several tasks: all stages are given the task's code, and each task has its own prior.

Source: Chen et al., CVPR 2023, Section 3.6 and Fig. 4d, for continual learning.
"""

import math

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from models.hierarchical_vae import HierarchicalVAE, Moments, Stage, moments_of

__all__ = ["ConditionalVAE"]


class ConditionalVAE(HierarchicalVAE):
    r"""Generative program :meth:`model` and recognition program :meth:`guide`, which are both given the task.

    Sites as in :class:`~models.hierarchical_vae.HierarchicalVAE`; the prior of z5 is normal with a mean and a standard deviation
    that are learned for each task. Batch norm uses the statistics of the batch, in evaluation mode too, as in the paper's public
    code: running averages over batches of several tasks fit none of the tasks.

    Args:
        size: side of the images: 32 or 64.
        width: channels of every hidden layer.
        tasks: number of tasks.
        channels: channels of the images.
        latents: channels of every latent layer.
        scale: standard deviation of x.
    """

    def __init__(
        self, size: int, width: int, tasks: int = 2, channels: int = 3, latents: int = 16, scale: float = math.sqrt(0.05)
    ) -> None:
        nn.Module.__init__(self)
        self.channels, self.size, self.latents, self.scale = channels, size, latents, scale
        self.tasks = tasks
        first = Stage(channels, width, 2 * latents, [0.5], tasks, running=False)
        self._build(width, tasks, first, running=False)
        self.top_prior = nn.Linear(tasks, 2 * latents, bias=False)

    def model(self, num_rows: int, task: int, x: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Generate images of a task, or score x of shape (num_rows, channels, size, size). Returns the means of the pixels."""
        pyro.module("top_prior", self.top_prior)
        pyro.module("top_down", self.top_down)
        with pyro.plate("rows", num_rows):
            code = self._code(num_rows, task)
            return self._generate(self._top(code), x, code, task)

    def guide(self, num_rows: int, task: int, x: Tensor) -> None:  # type: ignore[override]
        """Infer the latents of images x of a task, of shape (num_rows, channels, size, size)."""
        pyro.module("bottom_up", self.bottom_up)
        pyro.module("top_prior", self.top_prior)
        pyro.module("top_down", self.top_down)
        with pyro.plate("rows", num_rows):
            code = self._code(num_rows, task)
            self._infer(self._top(code), x, code, task)

    def _code(self, num_rows: int, task: int) -> Tensor:
        weight = self.top_prior.weight
        index = torch.full((num_rows,), task, device=weight.device)
        return one_hot(index, self.tasks).to(weight.dtype)

    def _top(self, code: Tensor) -> Moments:
        return moments_of(self.top_prior(code)[:, :, None, None])
