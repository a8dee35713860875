r"""The log ratio of two joint densities, averaged over the exact posterior of the teacher's latents.

.. math:: E_{z \sim p(z | y)} [\log p(z, y) - \log q(z, y)]

Its mean over y is the KL of the joint laws, which local distillation minimises. Knows two enumerated programs, and no losses.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_kd.errors import PlateMismatchError, UnsupportedDivergenceError
from pyro_kd.sites.elimination import Factor, weights_of
from pyro_kd.sites.enumeration import Enumerated

__all__ = ["expected_log_ratio"]


def expected_log_ratio(p: Enumerated, q: Enumerated, keep: Sequence[str], to_student: Mapping[str, str]) -> Tensor:
    """The expectation, summed over rows: a scalar tensor, differentiable with respect to the student.

    Args:
        p, q: the enumerated runs of teacher and student, with the same values at the targets.
        keep: the plates that hold all sites, by the teacher's names.
        to_student: the student's names of the teacher's sites and plates, where they differ.

    Raises:
        UnsupportedDivergenceError: a latent of one program has no counterpart with the same states.
        PlateMismatchError: a plate of the student has no counterpart.
    """
    _check_states(p, q, to_student)
    to_teacher = {mine: name for name, mine in to_student.items()}
    own = [factor._replace(value=factor.value.detach()) for factor in p.factors.values()]
    theirs = [_as_teacher(factor, p, q, to_teacher) for factor in q.factors.values()]
    weights = weights_of([*own, *theirs], own, p.latents, p.plates, keep, p.nesting, p.given)
    expected = [torch.where(w > 0, w * term.value, 0.0).sum() for w, term in zip(weights, [*own, *theirs], strict=True)]
    return torch.stack(expected[: len(own)]).sum() - torch.stack(expected[len(own) :]).sum()


def _check_states(p: Enumerated, q: Enumerated, to_student: Mapping[str, str]) -> None:
    twins = {name: to_student.get(name, name) for name in p.latents}
    lone = (twins.keys() - {name for name, twin in twins.items() if twin in q.latents}) | (
        q.latents.keys() - set(twins.values())
    )
    different = [name for name in twins if name not in lone and p.latents[name].states != q.latents[twins[name]].states]
    for name in sorted(lone) + different:
        what = (
            "has no counterpart in the other program" if name in lone else "has more states in one program than in the other"
        )
        raise UnsupportedDivergenceError(
            f"latent {name!r} {what}, so that the posteriors of the latents cannot be compared. Leave out control_variate, or name "
            "the pairs in site_map."
        )


def _as_teacher(factor: Factor, p: Enumerated, q: Enumerated, to_teacher: Mapping[str, str]) -> Factor:
    """A factor of the student with the dimensions and names of the teacher's latents and plates."""
    plates = frozenset(to_teacher.get(name, name) for name in factor.plates)
    for mine in factor.plates:
        name = to_teacher.get(mine, mine)
        if name not in p.plates or p.plates[name].dim != q.plates[mine].dim:
            raise PlateMismatchError(
                f"plate {mine!r} of the student has no counterpart in the same dimension of the teacher, which control_variate "
                "needs. Name it as the teacher does, or in site_map."
            )
    width = q.nesting + q.given
    value = factor.value[(None,) * max(width - factor.value.dim(), 0)]
    own = sorted(factor.latents, key=lambda name: q.latents[name].dim)
    twins = [to_teacher.get(name, name) for name in own]
    order = sorted(range(len(twins)), key=lambda i: p.latents[twins[i]].dim)
    rows = value.shape[value.dim() - width :]
    value = value.reshape(*(q.latents[name].states for name in own), *rows)
    value = value.permute(*order, *range(len(own), value.dim()))
    depth = max((-p.latents[name].dim for name in twins), default=width)
    shape = [1] * (depth - width)
    for name in twins:
        shape[depth + p.latents[name].dim] = p.latents[name].states
    return Factor(value.reshape(*shape, *rows), frozenset(twins), plates)
