"""Pyro's own ELBOs as compiled graphs: for the part of a loop that is no distillation."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_kd.capture import Capture, Run
from pyro_kd.losses.checks import leaves_of, params_of
from pyro_kd.losses.module import owners
from pyro_kd.training.annealing import ScaleLatentsMessenger

__all__ = ["CompiledELBO"]


class CompiledELBO:
    """An ELBO between a model and a guide whose handlers run once for each kind of arguments: call it for the differentiable loss.

    Args:
        elbo: one of Pyro's ELBOs with ``differentiable_loss``: ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``TraceGraph_ELBO``, ...
        model, guide: its programs.
        **options: see :meth:`DistillationLoss.compile <pyro_kd.losses.base.DistillationLoss.compile>`.

    Example:
        The new data's part of a continual loop in plain PyTorch::

            new = CompiledELBO(TraceMeanField_ELBO(), vae.model, vae.guide)
            loss = r * new(x) + (1 - r) * old(len(x))
            loss.backward()
    """

    def __init__(self, elbo: Any, model: Callable[..., Any], guide: Callable[..., Any], **options: Any) -> None:
        self.elbo, self.model, self.guide = elbo, model, guide
        modules = [owner for program in (model, guide) for owner in owners(program) if isinstance(owner, nn.Module)]
        self._capture = Capture(self._run, modules, type(elbo).__name__, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss for these arguments of model and guide, a scalar tensor. It may be NaN or infinite."""
        return self.value(None, args, kwargs)

    def value(self, latent_weight: float | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The loss with the log densities of its latents weighted (KL annealing); None leaves them alone."""
        extra = () if latent_weight is None else (torch.tensor(latent_weight, dtype=torch.get_default_dtype()),)
        options = getattr(self.elbo, "num_particles", None), getattr(self.elbo, "weight", None)
        outputs = self._capture(extra, args, kwargs, (options, latent_weight is None or latent_weight == 0))
        return self._value(extra, args, kwargs) if outputs is None else outputs.loss

    def _value(self, extra: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        model, guide = self.model, self.guide
        for weight in extra:
            model, guide = ScaleLatentsMessenger(weight)(model), ScaleLatentsMessenger(weight)(guide)
        value: Tensor = self.elbo.differentiable_loss(model, guide, *args, **kwargs)
        return value

    def _run(self, extra: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        with poutine.trace(param_only=True) as seen:
            value = self._value(extra, args, kwargs)
        return Run(value, (), leaves_of([value]) if torch.is_grad_enabled() else (), list(params_of(seen.trace)))
