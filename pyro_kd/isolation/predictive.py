"""Pyro's posterior predictive as a program: each run is one draw from the posterior, and one from the model given it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_kd.errors import InvalidProgramError
from pyro_kd.noise.between import drawing_for

__all__ = ["PosteriorPredictive", "as_program"]


class PosteriorPredictive:
    """The program whose runs are single draws of ``Predictive(model, posterior_samples)`` or ``Predictive(model, guide=guide)``.

    The sites of the posterior are hidden: they are parents of the other sites, and students do not have them. What remains is a
    mixture over posterior draws. The other latents of the model are its sites.

    Args:
        model: the model.
        posterior_samples: draws of some latents by name, of shapes ``(draws, ...)`` with the same number of draws.
        guide: draws the latents instead.
    """

    def __init__(
        self, model: Callable[..., Any], posterior_samples: Mapping[str, Tensor], guide: Callable[..., Any] | None = None
    ) -> None:
        self.model = model
        self.posterior_samples = dict(posterior_samples)
        self.guide = guide

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model given one draw from the posterior."""
        with drawing_for("a row of the posterior"):
            draw = self.draw_posterior(args, kwargs)
        given = poutine.condition(self.model, data=draw)
        return poutine.block(given, hide=list(draw))(*args, **kwargs)

    def draw_posterior(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Draw the latents that the posterior covers, by name, without the dimension of draws."""
        if self.guide is not None:
            with poutine.block(hide_types=["sample", "observe"]):  # a messenger guide runs the model, with its data
                trace = prune_subsample_sites(poutine.trace(self.guide).get_trace(*args, **kwargs))
            nodes: Any = trace.nodes
            return {name: nodes[name]["value"] for name in trace.stochastic_nodes}
        if not self.posterior_samples:
            return {}
        first = next(iter(self.posterior_samples.values()))
        row = torch.randint(len(first), (1,), device=first.device)  # a tensor, so that a captured graph draws it anew
        return {
            name: values.index_select(0, row.to(values.device)).squeeze(0) for name, values in self.posterior_samples.items()
        }


def as_program(predictive: Predictive) -> PosteriorPredictive:
    """Turn a ``Predictive`` into a program.

    Raises:
        InvalidProgramError: it is of a subclass that draws differently, or its samples differ in number.
    """
    if type(predictive).forward is not Predictive.forward:
        raise InvalidProgramError(
            f"{type(predictive).__name__} draws differently from Predictive, and each of its runs is many runs of the model. Draw "
            "from it first, and freeze Predictive(model, samples)."
        )
    sizes = {name: len(values) for name, values in predictive.posterior_samples.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise InvalidProgramError(
            f"Predictive needs the same number of samples for all sites, at least one, but has {sizes}"
        )
    return PosteriorPredictive(predictive.model, predictive.posterior_samples, predictive.guide)
