r"""Sum latents out of a product of densities, one after the other, each from the factors that contain it alone.

.. math:: \log \sum_{z_1} \dots \sum_{z_L} \prod_f f

For a Markov chain of latents with k states each, the largest table has :math:`k^2` entries and not :math:`k^L`. In plates: the
latents of the innermost plates go first, and the rows of a plate are added up before the latents outside of it are summed out.

Source: variable elimination (Zhang and Poole, 1994), with plates as in Obermeyer et al., Tensor Variable Elimination for Plated
Factor Graphs, ICML 2019. Knows tensors and names, and no programs.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache, reduce
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_kd.errors import PlateMismatchError, listing
from pyro_kd.utils.advice import advice

__all__ = ["Factor", "Latent", "Plate", "Scope", "eliminate", "largest_table", "plan", "weights_of"]

Scope = tuple[frozenset[str], frozenset[str]]
"""The latents and the plates of a factor."""


class Latent(NamedTuple):
    """A latent: the dimension of its states, counted from the right, their number, and its plates."""

    dim: int
    states: int
    plates: frozenset[str]


class Plate(NamedTuple):
    """A plate: its dimension, counted from the right, and its size."""

    dim: int
    size: int


class Factor(NamedTuple):
    """A log density: a tensor with a dimension for each latent and each plate that it depends on, and 1 in all others."""

    value: Tensor
    latents: frozenset[str]
    plates: frozenset[str]


class Step(NamedTuple):
    """The elimination of one latent: the latents of the product of its factors, itself included."""

    name: str
    joint: frozenset[str]


def eliminate(
    factors: Iterable[Factor],
    latents: Mapping[str, Latent],
    plates: Mapping[str, Plate],
    keep: Sequence[str],
    nesting: int,
    given: int,
) -> Tensor:
    """Sum out all latents, and add up the rows of all plates that are not kept.

    Args:
        factors: the log densities.
        latents, plates: all of them, by name.
        keep: names of plates that hold every factor.
        nesting: the number of dimensions on the right that plates may take.
        given: the number of dimensions of given states to the left of these. Those of latents are farther on the left.

    Returns:
        Tensor of the shape of the given states, then the sizes of the plates in ``keep``.

    Raises:
        PlateMismatchError: the latents cannot be summed out plate by plate.
    """
    left = list(factors)
    for name, _ in plan(tuple((f.latents, f.plates) for f in left), _hashable(latents)):
        dim, _, own = latents[name]
        joined = [_added_up(f, own, plates) for f in left if name in f.latents]
        value = reduce(torch.add, joined)
        scope = frozenset().union(*(f.latents for f in left if name in f.latents)) - {name}
        left = [f for f in left if name not in f.latents]
        left.append(Factor(value.logsumexp(dim, keepdim=True), scope, own))
    total = sum((_added_up(f, frozenset(keep), plates) for f in left), torch.zeros(()))
    width = nesting + given
    total = total[(None,) * max(width - total.dim(), 0)]
    total = total.reshape(total.shape[total.dim() - width :])
    kept = [*range(given), *(width + plates[name].dim for name in keep)]
    others = [dim for dim in range(width) if dim not in kept]
    return total.permute([*kept, *others]).squeeze(list(range(len(kept), width)))


def weights_of(
    terms: Sequence[Factor],
    factors: Iterable[Factor],
    latents: Mapping[str, Latent],
    plates: Mapping[str, Plate],
    keep: Sequence[str],
    nesting: int,
    given: int,
) -> list[Tensor]:
    r"""The probabilities of the states that each of some functions of the latents depends on, given what is observed.

    They are the derivatives of :math:`\log \sum_z \prod_f f` with respect to the logarithm of a further factor (Darwiche, A
    Differential Approach to Inference in Bayesian Networks, 2003).

    Args:
        terms: functions of the latents, laid out as factors are.
        factors, latents, plates, keep, nesting, given: as for :func:`eliminate`.

    Returns:
        For each function a constant of its shape.
    """
    with torch.enable_grad():
        probes = [term._replace(value=torch.zeros_like(term.value).requires_grad_()) for term in terms]
        constant = [factor._replace(value=factor.value.detach()) for factor in factors]
        total = eliminate([*constant, *probes], latents, plates, keep, nesting, given)
        return list(torch.autograd.grad(total.sum(), [probe.value for probe in probes]))


def _added_up(factor: Factor, own: frozenset[str], plates: Mapping[str, Plate]) -> Tensor:
    """The value of a factor, with the rows of all plates but ``own`` added up."""
    dims = [plates[name].dim for name in factor.plates - own]
    return factor.value.sum(dims, keepdim=True) if dims else factor.value


@lru_cache(maxsize=256)
def plan(scopes: tuple[Scope, ...], latents: tuple[tuple[str, Latent], ...]) -> tuple[Step, ...]:
    """The order in which latents are summed out: the innermost plates first, and then the smallest product of factors.

    Args:
        scopes: the latents and plates of each factor.
        latents: names and latents.

    Raises:
        PlateMismatchError: a factor outside of a plate depends on a latent inside; or latents of different plates meet in a factor.
    """
    known, left, todo, steps = dict(latents), list(scopes), list(dict(latents)), list[Step]()
    while todo:
        depth = max(len(known[name].plates) for name in todo)
        joints = {
            name: frozenset({name}).union(*(scope for scope, _ in left if name in scope))
            for name in todo
            if len(known[name].plates) == depth
        }
        name = min(joints, key=lambda n: prod(known[other].states for other in joints[n]))
        _check(name, joints[name], known, [held for scope, held in left if name in scope])
        steps.append(Step(name, joints[name]))
        left = [(scope, held) for scope, held in left if name not in scope]
        left.append((joints[name] - {name}, known[name].plates))
        todo.remove(name)
    return tuple(steps)


def _check(name: str, joint: Collection[str], latents: Mapping[str, Latent], holders: Iterable[frozenset[str]]) -> None:
    own = latents[name].plates
    remedy = f"Put them into the same plates, or {advice().rather('MultiSampleKD')}, or try pyro.infer.TraceEnum_ELBO."
    if not all(own <= held for held in holders):
        raise PlateMismatchError(
            f"latent {name!r} lies in the plates {listing(sorted(own))}, and a site outside of them depends on all its rows, whose "
            f"states cannot be summed out row by row. {remedy}"
        )
    for other in sorted(joint):
        if not latents[other].plates <= own:
            raise PlateMismatchError(
                f"latent {name!r} lies in the plates {listing(sorted(own))} and latent {other!r} in "
                f"{listing(sorted(latents[other].plates))}, and a site depends on both, so that their states cannot be summed out "
                f"plate by plate. {remedy}"
            )


def largest_table(
    scopes: Iterable[Scope], latents: Mapping[str, Latent], plates: Mapping[str, Plate]
) -> tuple[frozenset[str], int]:
    """The latents of the largest table of an elimination, and its number of elements.

    Args:
        scopes: the latents and plates of each factor.
        latents, plates: all of them, by name.
    """
    scopes = tuple(scopes)
    tables = [*scopes, *((step.joint, latents[step.name].plates) for step in plan(scopes, _hashable(latents)))]
    sizes = [
        (joint, prod(latents[name].states for name in joint) * prod(plates[name].size for name in held))
        for joint, held in tables
    ]
    return max(sizes, key=lambda table: table[1], default=(frozenset(), 0))


def _hashable(latents: Mapping[str, Latent]) -> tuple[tuple[str, Latent], ...]:
    return tuple(latents.items())
