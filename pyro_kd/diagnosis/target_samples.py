"""The targets of both programs as rows of numbers, drawn on shared noise: what a classifier and a distance are computed from.

Input: a loss and two programs. Output: :class:`TargetSamples`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_kd.diagnosis.paired_draws import PairedDraw, paired_draws
from pyro_kd.errors import UnsupportedDivergenceError, listing
from pyro_kd.losses.base import DistillationLoss
from pyro_kd.noise.samplers import draws_nothing, unwrapped
from pyro_kd.noise.statements import is_bookkeeping
from pyro_kd.sites.categories import num_categories, recoded_value
from pyro_kd.sites.pairing import names_in_student
from pyro_kd.sites.weighting import compared_elements

__all__ = ["TargetSamples", "held_plates", "rows_drawn", "target_samples"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class TargetSamples:
    """Rows of targets, of which each pair has one noise.

    Attributes:
        teacher, student: of shape ``(rows, numbers)``.
        distances: the mean over the rows of a run of the squared distance between the two, of shape ``(runs,)``. Categories
            that differ have distance 1 (2 where they are one-hot vectors). What a mask hides is equal in both.
        rows: the number of rows of a run.
    """

    teacher: Tensor
    student: Tensor
    distances: Tensor
    rows: int


def target_samples(
    loss: DistillationLoss, student: Program, teacher: Program, args: Any, kwargs: Any, *, rows: int, most_runs: int
) -> TargetSamples:
    """Draw the targets of both programs on shared noise.

    Args:
        loss: names the targets, and pairs the sites.
        student, teacher: the programs.
        args, kwargs: arguments of both.
        rows: how many rows are wanted.
        most_runs: how many runs are made for them at most.

    Raises:
        UnsupportedDivergenceError: the rows are no samples of the two laws: a plate draws which rows it takes, the student cannot
            draw a target, or the targets are not the same in each run.
    """
    to_student = names_in_student(loss.site_map)
    (first,) = paired_draws(loss, student, teacher, args, kwargs, 1)
    own = held_plates(first.student)
    held = {name: frame for name, frame in held_plates(first.teacher).items() if to_student.get(name, name) in own}
    for trace in (first.teacher, first.student):
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and site_is_subsample(site) and not draws_nothing(site["fn"]):
                raise UnsupportedDivergenceError(f"plate {name!r} draws the rows that it takes")
    size = prod(size for _, size in held.values())
    runs = max(2, min(ceil(rows / size), most_runs))
    draws = [first, *paired_draws(loss, student, teacher, args, kwargs, runs - 1)]
    found = [_as_rows(draw, to_student, [dim for dim, _ in held.values()], size) for draw in draws]
    if any(theirs.shape != found[0][0].shape or mine.shape != theirs.shape for theirs, mine, _ in found):
        raise UnsupportedDivergenceError("which targets a run has, or their shapes, depends on its draws")
    theirs, mine = (torch.cat([run[i] for run in found]) for i in range(2))
    if not (theirs.isfinite().all() and mine.isfinite().all()):
        raise UnsupportedDivergenceError("a draw of a target is not finite")
    return TargetSamples(theirs, mine, torch.stack([distance for _, _, distance in found]), size)


def held_plates(trace: Trace) -> dict[str, tuple[int, int]]:
    """The plates that hold every site that the program draws: name -> dimension, counted from the right, and size."""
    sites = [site for site in trace.nodes.values() if site["type"] == "sample" and not is_bookkeeping(site)]
    drawn = [site for site in sites if not site["is_observed"]] or sites  # a value that is given is an input, and no row
    frames: list[dict[str, tuple[int, int]]] = [
        {frame.name: (frame.dim or 0, _size(frame, site["fn"])) for frame in site["cond_indep_stack"] if frame.vectorized}
        for site in drawn
    ]
    return {name: frame for name, frame in frames[0].items() if all(name in plates for plates in frames)}


def rows_drawn(trace: Trace) -> int:
    """The number of rows that a run draws: those of :func:`held_plates`, of which a subsampled plate takes a part."""
    sites = [site for site in trace.nodes.values() if site["type"] == "sample" and not is_bookkeeping(site)]
    sizes = {frame.name: frame.size for site in sites for frame in site["cond_indep_stack"] if frame.vectorized}
    return prod(size if sizes.get(name, -1) < 0 else sizes[name] for name, (_, size) in held_plates(trace).items())


def _size(frame: Any, fn: Any) -> int:
    """The size of a plate, which ``pyro.plate(name)`` leaves to the distributions inside it."""
    size: int = frame.full_size or frame.size
    return size if size >= 0 else int(fn.batch_shape[frame.dim])


def _as_rows(draw: PairedDraw, to_student: Mapping[str, str], dims: list[int], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The targets of both programs, each of shape ``(rows, numbers)``, and their mean squared distance."""
    columns, distance = list[tuple[Tensor, Tensor]](), torch.zeros(()).double()
    if draw.undrawn:
        raise UnsupportedDivergenceError(f"the student cannot draw {listing(draw.undrawn)}")
    for name in draw.targets:
        site: Any = draw.teacher.nodes[name]
        twin: Any = draw.student.nodes[to_student.get(name, name)]
        theirs, mine = site["value"], recoded_value(twin["value"], twin["fn"], site["fn"])
        event = len(site["fn"].event_shape)
        places = [theirs.dim() - event + dim for dim in dims]
        if theirs.shape != mine.shape or min(places, default=0) < 0:
            raise UnsupportedDivergenceError(f"target {name!r} has shape {tuple(theirs.shape)} against {tuple(mine.shape)}")
        counts = torch.as_tensor(compared_elements(site)).to(theirs.device)
        theirs, mine = (torch.where(counts, value, torch.zeros_like(value)) for value in (theirs, mine))
        pair = [value.movedim(places, list(range(len(dims)))).reshape(size, -1).double().cpu() for value in (theirs, mine)]
        is_index = num_categories(site["fn"]) is not None and not unwrapped(site["fn"]).event_shape
        apart = (pair[0] != pair[1]).double() if is_index else (pair[0] - pair[1]).square()
        distance = distance + apart.sum() / size
        columns.append((pair[0], pair[1]))
    return torch.cat([a for a, _ in columns], 1), torch.cat([b for _, b in columns], 1), distance
