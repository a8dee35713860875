"""Whether the rows of a batch can serve each other as samples: whether a row's distributions depend on its own latents alone.

Found out by one more run of each program. Every latent is given the value of the row before it, and every target keeps its row's
value. If all distributions then are those of the row before, nothing but latents decides on them: no target of the row, no input, no
number of the row. Knows programs and their traces; :mod:`pyro_kd.losses.multi_sample` asks.
"""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_kd.divergences.log_densities import log_density
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

__all__ = ["obstacle_to_exchange"]


def obstacle_to_exchange(
    run: PairedRun, student: Program, teacher: Program, args: Any, kwargs: Any, targets_in_student: Collection[str]
) -> str:
    """Why the rows of a batch cannot serve each other as samples; empty if they can.

    A dependence of the student that its current parameters switch off, such as a last layer of zeros, counts as well, if it is
    differentiable in the targets.

    Args:
        run: a run of both programs.
        student, teacher: the programs.
        args, kwargs: the arguments of that run.
        targets_in_student: the student's names of the targets.
    """
    rows = row_plates(run)
    if len(rows) != 1:
        return f"{len(rows)} plates hold every latent and target, and not one"
    (dim,) = rows
    for pair in targets_of(run):
        if any(mask is not None for mask in (pair.mask, pair.teacher_mask, inner_mask(pair.p), inner_mask(pair.q))):
            return f"target {pair.name!r} is masked"
        if pair.p.batch_shape[dim] < 2:
            return "the batch has one row"
    with without_effect(student):
        with torch.no_grad(), nullcontext() if is_frozen(teacher) else evaluation_mode(teacher):
            names = [pair.name for pair in targets_of(run)]
            obstacle = _obstacle(teacher, run.teacher, names, dim, args, kwargs)
        if obstacle:
            return f"in the teacher, {obstacle}"
        with torch.enable_grad():
            obstacle = _obstacle(student, run.student, targets_in_student, dim, args, kwargs)
    return obstacle and f"in the student, {obstacle}"


def _obstacle(program: Program, trace: Trace, targets: Collection[str], dim: int, args: Any, kwargs: Any) -> str:
    sites: dict[str, Any] = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and (name in targets or not (site["is_observed"] or is_bookkeeping(site)))
    }
    moved = {name: site["value"].detach().roll(1, dim - len(site["fn"].event_shape)) for name, site in sites.items()}
    kept = {name: sites[name]["value"].detach().clone() for name in targets if name in sites}
    for value in kept.values():
        value.requires_grad_(value.is_floating_point() and torch.is_grad_enabled())
    try:
        with _Given(moved | kept):
            again: Any = get_trace(program, args, kwargs).nodes
        for name, site in sites.items():
            if name not in again:
                return f"site {name!r} is not in every run"
            before, _ = unmask(site["fn"], None)
            after, _ = unmask(again[name]["fn"], None)
            reached = leaves_of(tensors_in(vars(after)))
            if not reached.isdisjoint(kept.values()):
                return f"the distribution of {name!r} depends on targets"
            if any(_is_one_for_all(leaf, after.batch_shape[dim]) for leaf in reached):
                return f"the distribution of {name!r} has a parameter that may belong to rows"
            first = log_density(before, site["value"].detach()).detach().roll(1, dim)
            second = log_density(after, moved[name]).detach()
            if not torch.allclose(first, second, rtol=1e-5, atol=1e-5, equal_nan=True):
                return f"the distribution of {name!r} depends on targets, inputs or numbers of its row"
    except (NotImplementedError, KeyError, ValueError, RuntimeError) as error:
        return f"the run with the latents of other rows fails ({type(error).__name__})"
    return ""


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
