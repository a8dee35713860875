"""Teacher forcing: coins that decide which latent values of the teacher the student is given, for each site and row.

A row is an element of the site's batch shape, so the plates around a site decide what it is. The coins are independent of each other
and of everything else. For any outcome, the given elements count as targets, so the loss remains a bound.
"""

from collections.abc import Callable, Collection, Mapping
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_kd.losses.targets import Weight
from pyro_kd.noise.samplers import has_derivative

__all__ = ["Chance", "Given", "Latents", "Options", "advised", "chance_option", "tossed"]

Chance = float | Tensor
"""The probability of heads. In a compiled graph it is a scalar tensor, so that a schedule needs no new graph."""

Given = bool | Tensor
"""Which elements of a site the student is given: all, none, or a boolean tensor of its batch shape."""


class Latents(NamedTuple):
    """What a first run of both programs has shown about their latents, by the teacher's names.

    Attributes:
        givable: those whose distributions can be compared, so that the student can be given their values.
        cut: those through whose draws in the student no gradient passes, whatever the teacher's family.
    """

    givable: frozenset[str]
    cut: frozenset[str]


class Options(Protocol):
    """The options of a loss that this is about; see :class:`~pyro_kd.losses.base.DistillationLoss`."""

    teacher_forcing: Weight | None
    local_first: float
    student_fraction: Weight


def chance_option(loss: Options, option: str) -> Weight:
    """``teacher_forcing`` or ``student_fraction``, as a probability by site. Left open, it is that of latents with a derivative."""
    value: Weight | None = getattr(loss, option)
    return loss.local_first if value is None else value


def advised(cut: Mapping[str, Any], latents: Latents | None, chance_of: Callable[[str], Chance]) -> Callable[[str], Chance]:
    """Teacher forcing where the user leaves it open: what has no derivative is given, since no gradient would pass through it.

    Args:
        cut: the teacher's sites, by name, without those that have a ``discrete_gradient``.
        latents: what is known about both programs; None before the first run.
        chance_of: the probability at other sites, if they can be given.
    """
    cut_in_student = frozenset[str]() if latents is None else latents.cut

    def chance(name: str) -> Chance:
        if name in cut and (name in cut_in_student or not has_derivative(cut[name]["fn"])):
            return 1.0
        return chance_of(name) if latents is None or name in latents.givable else 0.0

    return chance


def tossed(sites: Mapping[str, Any], names: Collection[str], chance_of: Callable[[str], Chance]) -> dict[str, Given]:
    """Toss a coin for each row of each site.

    Args:
        sites: the teacher's sites, by name.
        names: the sites to toss coins for.
        chance_of: the probability of heads of a site.

    Returns:
        For each site, True where its probability is the number 1, and a boolean tensor of the site's batch shape otherwise; sites
        with the number 0 are left out.
    """
    given: dict[str, Given] = {}
    tossing: list[tuple[str, Chance]] = []
    for name in names:
        chance = chance_of(name)
        if isinstance(chance, Tensor) or 0 < chance < 1:
            tossing.append((name, chance))
        elif chance == 1:
            given[name] = True
    for (shape, device), group in groupby(tossing, lambda item: _place(sites[item[0]])):
        toss = list(group)
        uniform = torch.rand(len(toss), *shape, device=device)  # one operation for the sites of a sequence
        first = toss[0][1]
        if all(chance is first or (not isinstance(first, Tensor) and chance == first) for _, chance in toss):
            heads = (uniform < first).unbind()
        else:
            heads = tuple(row < chance for row, (_, chance) in zip(uniform.unbind(), toss, strict=True))
        given |= zip([name for name, _ in toss], heads, strict=True)
    return given


def _place(site: Any) -> tuple[torch.Size, torch.device]:
    return getattr(site["fn"], "batch_shape", torch.Size()), site["value"].device
