"""The rows of a run: the independent parts of both programs, each of which has a mixture of its own in a multi-sample bound.

A row is an element of the plates that hold every draw of both programs. Everything else (inner plates, events, batch dimensions that
no plate declares) belongs to its row. Knows traces and pairs of sites.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

from pyro.poutine import Trace
from torch import Tensor

from pyro_kd.errors import PlateMismatchError, UnsupportedDivergenceError
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.noise.point_masses import is_point
from pyro_kd.noise.statements import is_bookkeeping
from pyro_kd.sites.compatibility import check_same_weighting
from pyro_kd.sites.pairing import SitePair
from pyro_kd.sites.weighting import unmask
from pyro_kd.utils import guards
from pyro_kd.utils.advice import advice

__all__ = ["batch_depth", "check_targets", "drawn_sites", "row_plates", "row_scale", "scores_of", "summed", "targets_of"]


def targets_of(run: PairedRun) -> list[SitePair]:
    """The pairs of target sites."""
    return [pair for pair in run.pairs if pair.is_target]


def drawn_sites(trace: Trace) -> Iterator[tuple[str, Any]]:
    """The sites of a trace that draw, with their names."""
    site: Any
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site["is_observed"] and not is_bookkeeping(site):
            yield name, site


def row_plates(run: PairedRun) -> dict[int, str]:
    """The plates that hold every draw of both programs: dimension -> the student's name, from the left to the right."""
    student = [site["cond_indep_stack"] for _, site in drawn_sites(run.student)] + [
        pair.student_plates for pair in run.pairs
    ]
    teacher = [site["cond_indep_stack"] for _, site in drawn_sites(run.teacher)] + [pair.plates for pair in run.pairs]
    mine, theirs = _common(student), _common(teacher)
    return {dim: mine[dim] for dim in sorted(mine) if dim in theirs}


def _common(stacks: Sequence[Iterable[Any]]) -> dict[int, str]:
    held = [{(frame.dim, frame.name) for frame in stack if frame.vectorized} for stack in stacks]
    return dict(set.intersection(*held)) if held else {}


def batch_depth(*traces: Trace) -> int:
    """The number of batch dimensions that the sites of some traces take."""
    nodes: list[Any] = [site for trace in traces for site in trace.nodes.values()]
    sites = [site for site in nodes if site["type"] == "sample"]
    plates = [-frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.vectorized]
    return max([0, *plates, *(len(getattr(site["fn"], "batch_shape", ())) for site in sites)])


def row_scale(run: PairedRun, rows: Iterable[int]) -> float | Tensor:
    """The factor of the bound of each row, from subsampled plates of rows and ``poutine.scale``: a number or a scalar tensor.

    Raises:
        PlateMismatchError: the targets have different factors, or one within a row.
    """
    pairs = targets_of(run)
    for pair in pairs:
        inner = [frame for frame in pair.plates if frame.dim not in rows or not frame.vectorized]
        for frame in inner:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise PlateMismatchError(
                    f"target {pair.name!r} lies in the plate {frame.name!r}, which is subsampled inside a row: the log of a mean "
                    f"over samples of the noise needs all elements of a row. Take the whole plate, or "
                    f"{advice().rather('SurrogateKD')}."
                )
        is_one = not isinstance(pair.scale, Tensor) or pair.scale.numel() == 1
        if not is_one or not guards.equal(pair.scale, pairs[0].scale, "the scales of all targets are equal"):
            raise PlateMismatchError(
                f"the scale of target {pair.name!r} is not the same for all targets and rows. MultiSampleKD has one bound for all "
                f"targets of a row: use poutine.scale around the whole programs, or {advice().rather('SurrogateKD')}."
            )
    return pairs[0].scale


def check_targets(run: PairedRun) -> None:
    """Check that the targets have densities, weighted alike in both programs.

    Raises:
        UnsupportedDivergenceError: a target is a point mass.
        PlateMismatchError: masks or scales of a pair differ.
    """
    for pair in targets_of(run):
        check_same_weighting(pair)
        if is_point(pair.p) or is_point(pair.q):
            raise UnsupportedDivergenceError(
                f"target {pair.name!r} is a point mass (Delta), which has no density to average over samples of the noise. Use as "
                "target the draw that it is a function of, or "
                f"{advice().rather('SurrogateKD, which compares point masses by their distance')}."
            )


def scores_of(trace: Trace, kept: Sequence[int], without: Container[str] = ()) -> Tensor | None:
    """The log probability of the draws whose values have no derivative, by row; None if nothing that is trained decides on them.

    Args:
        trace: the student's trace.
        kept: the dimensions of rows, see :func:`summed`.
        without: names of draws to leave out.

    Returns:
        Tensor with the dimensions of ``kept``, or None.
    """
    total: Tensor | None = None
    for name, site in drawn_sites(trace):
        if site["value"].requires_grad or name in without:
            continue
        fn, _ = unmask(site["fn"], None)
        log_prob = fn.log_prob(site["value"])
        if log_prob.requires_grad:
            found = summed(log_prob, kept)
            total = found if total is None else total + found
    return total


def summed(tensor: Tensor, kept: Sequence[int], lead: int = 0) -> Tensor:
    """The sum of a tensor over all dimensions but some.

    Args:
        tensor: of a batch shape.
        kept: negative dimensions that are kept, from the left to the right.
        lead: the number of dimensions on the left that are kept as well.
    """
    dims = [dim for dim in range(-tensor.dim() + lead, 0) if dim not in kept]
    return tensor.sum(dims) if dims else tensor
