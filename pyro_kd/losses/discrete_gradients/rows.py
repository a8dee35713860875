"""The independent rows of a run, and the share of each in the loss.

A change of a draw in one row of a plate changes the loss of that row alone, if all that follows is inside of the plate too. So the
effects of changes in all rows can be told apart. As for Pyro's ``TraceGraph_ELBO``, plates are taken at their word: what a program
computes in one row must not depend on the others."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.losses.targets import weight_of
from pyro_kd.losses.terms import divergence_at
from pyro_kd.noise.statements import is_statement
from pyro_kd.sites.pairing import names_in_student

__all__ = ["Rows", "values_of"]


@dataclass(frozen=True)
class Rows:
    """The dimensions of plates along which the rows of a run are independent.

    Attributes:
        sizes: dimension of the batch shape, as a negative number -> its size.
    """

    sizes: Mapping[int, int]

    @classmethod
    def after(cls, trace: Trace, names: Collection[str]) -> "Rows":
        """The rows that stay apart from the first of the named sites on: the plates around it and around all sites after it."""
        common: set[tuple[str, Any, int]] | None = None
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or is_statement(site) or (common is None and name not in names):
                continue
            plates: set[tuple[str, Any, int]] = {
                (frame.name, frame.dim, frame.size) for frame in site["cond_indep_stack"] if frame.vectorized
            }
            common = plates if common is None else common & plates
        return cls({dim: size for _, dim, size in common or ()})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one number per row, with dimensions of size 1 in between."""
        return tuple(self.sizes.get(dim, 1) for dim in range(min(self.sizes, default=0), 0))

    def sum(self, values: Tensor, event_dim: int = 0) -> Tensor:
        """The sum over each row, of a shape that broadcasts with :attr:`shape`.

        Args:
            values: of shape ``batch_shape + event_shape``.
            event_dim: the number of its event dimensions.
        """
        over = [dim for dim in range(-values.dim(), 0) if dim + event_dim not in self.sizes or dim >= -event_dim]
        total = values.sum(over, keepdim=True) if over else values
        return total.reshape(total.shape[: total.dim() - event_dim])


def values_of(run: PairedRun, weights: Mapping[str, Any], loss: Any) -> dict[str, Tensor]:
    """What each site adds to the loss, by the student's names: tensors of the sites' batch shapes.

    Args:
        run: a run of both programs.
        weights: the weights of terms by the teacher's names; those of other sites are the loss's.
        loss: the loss, for its options.
    """
    to_student, found = names_in_student(loss.site_map), {}
    vectorized = loss.num_particles if loss.vectorize_particles else 1
    with torch.no_grad(), run.evaluating():
        for pair in run.pairs:
            weight = weights.get(pair.name)
            if weight is None:
                weight = 1.0 if pair.is_target else weight_of(pair.name, loss.latent_weight)
            if not isinstance(weight, Tensor) and weight == 0:
                continue
            item = divergence_at(pair, loss.divergence, loss.latent_divergence, loss.latent_reduction, vectorized)
            found[to_student.get(pair.name, pair.name)] = weight * item.elements()
    return found
