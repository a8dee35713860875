"""Pyro's own ELBOs as compiled graphs, for the part of a loop that is no distillation."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_kd.capture import Capture, DeferredReads, Outputs, Run
from pyro_kd.losses.constraints import parameter_checks, raise_for
from pyro_kd.sites.full_precision import in_full_precision
from pyro_kd.sites.tracing import params_of
from pyro_kd.training.annealing import ScaleLatentsMessenger
from pyro_kd.utils.autocast import full_precision
from pyro_kd.utils.autograd import leaves_of

__all__ = ["CompiledELBO"]


class CompiledELBO:
    """An ELBO between a model and a guide whose handlers run once per specialisation: call it for the differentiable loss.

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
        roots = {"elbo": elbo, "model": model, "guide": guide}
        self._capture = Capture(self._run, self._run_eagerly, roots, type(elbo).__name__, **options)
        self._deferred = DeferredReads()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss for these arguments of model and guide, a scalar tensor. It may be NaN or infinite.

        Raises:
            InvalidParameterError: a parameter of a distribution has left its constraint. On a GPU an earlier call's.
        """
        return self.value(None, args, kwargs)

    def value(
        self,
        latent_weight: float | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        check_loss: Callable[[Tensor], None] = lambda loss: None,
    ) -> Tensor:
        """The loss with the log densities of its latents weighted (KL annealing); None leaves them alone.

        ``check_loss`` is called with the loss, a scalar. On a GPU it is called as soon as the value is known, in a later call; until
        then the gradient of a loss that is not finite is 0.
        """
        extra = () if latent_weight is None else (torch.tensor(latent_weight, dtype=torch.get_default_dtype()),)
        self._deferred.collect()
        outputs = self._capture(extra, args, kwargs, latent_weight == 0)
        if outputs.notes:
            self._check(outputs)
        if outputs.loss.device.type == "cpu" or not outputs.is_from_graph:
            check_loss(outputs.loss.detach())
        else:
            held = outputs._replace(loss=outputs.loss.detach())
            self._deferred.add(held.loss, lambda loss: check_loss(torch.as_tensor(loss)) if held.is_valid else None)
        return outputs.loss

    def _check(self, outputs: Outputs) -> None:
        holds, is_good = outputs.details
        if is_good.device.type != "cpu":
            self._deferred.add(is_good, lambda good: None if good else raise_for(outputs.notes, holds.tolist()))
        elif not is_good.item():
            raise_for(outputs.notes, holds.tolist())

    @full_precision()
    def _value(self, extra: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        model, guide = in_full_precision(self.model), in_full_precision(self.guide)
        for weight in extra:
            model, guide = ScaleLatentsMessenger(weight)(model), ScaleLatentsMessenger(weight)(guide)
        value: Tensor = self.elbo.differentiable_loss(model, guide, *args, **kwargs)
        return value

    def _run_eagerly(self, extra: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any], static: Any) -> Run:
        return Run(self._value(extra, args, kwargs))

    def _run(self, extra: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any], static: Any) -> Run:
        with poutine.trace(param_only=True) as seen, _SitesMessenger() as sites:
            value = self._value(extra, args, kwargs)
        checks = parameter_checks(sites.found)
        holds = torch.stack([check.holds.to(value.device) for check in checks]) if checks else None
        leaves = leaves_of([value]) if torch.is_grad_enabled() else ()
        notes = [check._replace(holds=value.detach()) for check in checks]
        return Run(value, () if holds is None else (holds, holds.all()), leaves, list(params_of(seen.trace)), notes)


class _SitesMessenger(Messenger):
    """Collects names and distributions of sample sites."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Any]] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        self.found.append((msg["name"], msg["fn"]))
