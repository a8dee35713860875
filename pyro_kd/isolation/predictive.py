"""A posterior predictive of Pyro's as a program: each run is one draw of the posterior, and of the model given it."""

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
    """What ``Predictive(model, posterior_samples)`` or ``Predictive(model, guide=guide)`` draws, one draw a run.

    The sites of the posterior are hidden, as they are parents of the others and in no program of the student's: what remains is a
    mixture over posterior draws. Other latents of the model are its sites.

    Args:
        model: the model.
        posterior_samples: draws of some of its latents, by name, in rows of one number.
        guide: draws the latents instead.
    """

    def __init__(
        self, model: Callable[..., Any], posterior_samples: Mapping[str, Tensor], guide: Callable[..., Any] | None = None
    ) -> None:
        self.model = model
        self.posterior_samples = dict(posterior_samples)
        self.guide = guide

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on its arguments, given one draw of the posterior."""
        with drawing_for("a row of the posterior"):
            draw = self.draw_posterior(args, kwargs)
        given = poutine.condition(self.model, data=draw)
        return poutine.block(given, hide=list(draw))(*args, **kwargs)

    def draw_posterior(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """One draw of the latents that the posterior says something of, by name."""
        if self.guide is not None:
            with poutine.block(hide_types=["sample"]):
                trace = prune_subsample_sites(poutine.trace(self.guide).get_trace(*args, **kwargs))
            nodes: Any = trace.nodes
            return {name: nodes[name]["value"] for name in trace.stochastic_nodes}
        if not self.posterior_samples:
            return {}
        first = next(iter(self.posterior_samples.values()))
        row = torch.randint(len(first), (1,), device=first.device)  # a tensor, so that a captured graph draws anew
        return {
            name: values.index_select(0, row.to(values.device)).squeeze(0) for name, values in self.posterior_samples.items()
        }


def as_program(predictive: Predictive) -> PosteriorPredictive:
    """Write a ``Predictive`` as a program.

    Raises:
        InvalidProgramError: it is of a subclass that draws otherwise, or its samples differ in number.
    """
    if type(predictive).forward is not Predictive.forward:
        raise InvalidProgramError(
            f"{type(predictive).__name__} draws otherwise than Predictive, by weights or code of its own, and each of its runs is "
            "many runs of the model. Draw from it first, and freeze Predictive(model, samples)."
        )
    sizes = {name: len(values) for name, values in predictive.posterior_samples.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise InvalidProgramError(f"Predictive has no draws in common for its sites, whose numbers of samples are {sizes}")
    return PosteriorPredictive(predictive.model, predictive.posterior_samples, predictive.guide)
