"""Whether the rows of a batch can serve each other as samples: whether a row's distributions depend on its own latents alone.

Found out by one more run of each program. Every latent is given the value of the row before it, and every target keeps its row's
value. A distribution that then is that of the row before depends on nothing but latents; one that has not changed depends on its row:
on a target, an input, or the number of the row. Knows programs and their traces; :mod:`pyro_kd.losses.multi_sample` asks.
"""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_kd.divergences.log_densities import log_density
from pyro_kd.errors import listing
from pyro_kd.isolation.effects import without_effect
from pyro_kd.isolation.freezing import is_frozen
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.losses.program_pair import Program
from pyro_kd.losses.rows import row_plates, targets_of
from pyro_kd.noise.messengers import SampleMessenger
from pyro_kd.noise.statements import is_bookkeeping
from pyro_kd.sites.tracing import get_trace
from pyro_kd.sites.weighting import inner_mask, unmask
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.tensors import tensors_in

__all__ = ["Exchange", "exchange_of"]


class Exchange(NamedTuple):
    """What decides on the distributions at the sites of both programs.

    Attributes:
        obstacle: why the rows of a batch cannot serve each other as samples at all; empty if they can.
        student: the student's sites whose distributions belong to their row: to its targets, inputs or number.
        teacher: those of the teacher. At all other sites, nothing but latents of the row decides.
    """

    obstacle: str = ""
    student: frozenset[str] = frozenset()
    teacher: frozenset[str] = frozenset()

    @property
    def is_by_latents(self) -> bool:
        """Whether nothing but latents decides on any distribution."""
        return not (self.obstacle or self.student or self.teacher)

    def __str__(self) -> str:
        if self.obstacle:
            return self.obstacle
        return f"targets, inputs or numbers of rows decide on the distribution of {listing(sorted(self.student | self.teacher))}"


def exchange_of(
    run: PairedRun, student: Program, teacher: Program, args: Any, kwargs: Any, targets_in_student: Collection[str]
) -> Exchange:
    """Find out what decides on the distributions of both programs.

    A dependence of the student that its current parameters switch off, such as a last layer of zeros, counts as well, if it is
    differentiable in the values.

    Args:
        run: a run of both programs.
        student, teacher: the programs.
        args, kwargs: the arguments of that run.
        targets_in_student: the student's names of the targets.
    """
    rows = row_plates(run)
    if len(rows) != 1:
        return Exchange(f"{len(rows)} plates hold every latent and target, and not one")
    (dim,) = rows
    for pair in targets_of(run):
        if any(mask is not None for mask in (pair.mask, pair.teacher_mask, inner_mask(pair.p), inner_mask(pair.q))):
            return Exchange(f"target {pair.name!r} is masked")
        if pair.p.batch_shape[dim] < 2:
            return Exchange("the batch has one row")
    names = [pair.name for pair in targets_of(run)]
    try:
        with without_effect(student):
            with torch.no_grad(), nullcontext() if is_frozen(teacher) else evaluation_mode(teacher):
                theirs = _sites_of_rows(teacher, run.teacher, names, dim, args, kwargs)
            with torch.enable_grad():
                mine = _sites_of_rows(student, run.student, targets_in_student, dim, args, kwargs)
    except _ObstacleError as error:
        return Exchange(str(error))
    except (NotImplementedError, KeyError, ValueError, RuntimeError) as error:
        return Exchange(f"a run with the latents of other rows fails ({type(error).__name__})")
    return Exchange("", mine, theirs)


class _ObstacleError(Exception):
    """The rows of a program cannot be told from each other's latents."""


def _sites_of_rows(
    program: Program, trace: Trace, targets: Collection[str], dim: int, args: Any, kwargs: Any
) -> frozenset[str]:
    """The sites whose distributions belong to their row, found by one more run with the latents of other rows."""
    sites: dict[str, Any] = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and (name in targets or not (site["is_observed"] or is_bookkeeping(site)))
    }
    moved = {name: site["value"].detach().roll(1, dim - len(site["fn"].event_shape)) for name, site in sites.items()}
    kept = {name: sites[name]["value"].detach().clone() for name in targets if name in sites}
    given = moved | kept
    for value in (*moved.values(), *kept.values()):
        value.requires_grad_(value.is_floating_point() and torch.is_grad_enabled())
    with _Given(given):
        again: Any = get_trace(program, args, kwargs).nodes
    found = set[str]()
    for name, site in sites.items():
        if name not in again:
            raise _ObstacleError(f"site {name!r} is not in every run")
        before, _ = unmask(site["fn"], None)
        after, _ = unmask(again[name]["fn"], None)
        reached = leaves_of(tensors_in(vars(after)))
        has_rows = any(_is_one_for_all(leaf, after.batch_shape[dim]) for leaf in reached)
        value = site["value"].detach()
        first = log_density(before, value).detach()
        follows = log_density(after, moved[name].detach()).detach()
        if not has_rows and reached.isdisjoint(kept.values()) and _are_close(first.roll(1, dim), follows):
            continue
        stays = log_density(after, value).detach()
        if not reached.isdisjoint(given[latent] for latent in given.keys() - kept.keys()) or not _are_close(first, stays):
            raise _ObstacleError(
                f"both the latents of a row and its targets, inputs or number decide on the distribution of {name!r}"
            )
        found.add(name)
    latents = found.difference(targets)
    if latents:  # do inputs alone decide on them?
        with _Given(moved):
            again = get_trace(program, args, kwargs).nodes
        for name in latents:
            before, after = (unmask(site["fn"], None)[0] for site in (sites[name], again[name]))
            value = sites[name]["value"].detach()
            is_same = _are_close(log_density(before, value).detach(), log_density(after, value).detach())
            if not is_same or not leaves_of(tensors_in(vars(after))).isdisjoint(moved[target] for target in kept):
                raise _ObstacleError(f"targets of a row decide on the distribution of latent {name!r}")
    return frozenset(found)


def _are_close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-4, atol=1e-4, equal_nan=True)


def _is_one_for_all(leaf: Tensor, num_rows: int) -> bool:
    """Whether a parameter has a value for each row, but one value for all so far, so that no run can tell the rows apart."""
    dims = [dim for dim, size in enumerate(leaf.shape) if size == num_rows]
    return any(bool((leaf == leaf.narrow(dim, 0, 1)).all()) for dim in dims)


class _Given(SampleMessenger):
    """Gives a program the values of its draws, observed or not."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        if msg["name"] in self._values:
            msg["value"], msg["is_observed"] = self._values[str(msg["name"])], False
