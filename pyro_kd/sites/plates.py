"""The plates of two programs: whether both have them, with the same sizes and the same rows.

Knows traces and Pyro's site dictionaries, and no pairs of sites.
"""

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_kd.errors import PlateMismatchError
from pyro_kd.noise.samplers import draws_nothing
from pyro_kd.noise.statements import is_whole_plate
from pyro_kd.sites.unpaired import LoneSites
from pyro_kd.utils import guards
from pyro_kd.utils.advice import advice

__all__ = [
    "Sizes",
    "check_same_rows",
    "differing_plates",
    "lone_plates",
    "row_numbers",
    "size_error",
    "sizes_around",
    "sizes_at",
    "sizes_of",
    "undeclared_dims",
]

Sizes = dict[str, tuple[int, int]]
"""Name of a plate -> its size, and how many of its rows are taken."""


def check_same_rows(*, student: Trace, teacher: Trace, to_student: Mapping[str, str], fresh: Container[str]) -> None:
    """Raise PlateMismatchError if a subsampled plate takes different rows in student and teacher.

    Args:
        student, teacher: the traces.
        to_student: the student's names of the teacher's sites, see :func:`~pyro_kd.sites.pairing.names_in_student`.
        fresh: names of plates that need no counterpart.
    """
    for name, site in teacher.nodes.items():
        if site["type"] != "sample" or not site_is_subsample(site) or name in fresh:
            continue
        twin: Any = student.nodes.get(to_student.get(name, name))
        if twin is None or not site_is_subsample(twin):
            continue
        if is_whole_plate(site) and is_whole_plate(twin):
            continue
        rows, own = row_numbers(site), row_numbers(twin)
        if rows is None or own is None or guards.equal(rows, own, "two plates take the same rows"):
            continue
        if not (_are_all(rows, site) and _are_all(own, twin)) and _are_valid(rows, site) and _are_valid(own, twin):
            raise PlateMismatchError(
                f"plate {name!r} takes different rows in student and teacher, so the draws inside it do not belong together. Give "
                "both the same subsample=, or neither: then they share the noise behind the rows."
            )


def row_numbers(plate: Any) -> Tensor | None:
    """The row numbers that a plate takes, of shape ``(rows,)``; None if its subsample is not a list of whole numbers."""
    try:
        rows = torch.as_tensor(plate["value"])
    except (TypeError, ValueError, RuntimeError):
        return None
    is_whole = not (rows.is_floating_point() or rows.is_complex() or rows.dtype is torch.bool)
    return rows if is_whole and rows.dim() == 1 else None


def _are_valid(rows: Tensor, plate: Any) -> bool:
    """Whether a plate has rows of these numbers. A subsample may hold other whole numbers, such as data."""
    return len(rows) == 0 or guards.holds((rows >= 0) & (rows < plate["fn"].size), "the rows of a plate are valid")


def _are_all(rows: Tensor, plate: Any) -> bool:
    if is_whole_plate(plate):
        return True
    return guards.equal(rows, torch.arange(len(rows), device=rows.device), "a plate takes its first rows in order")


def lone_plates(*, student: Trace, teacher: Trace, to_student: Mapping[str, str], missing: Container[str]) -> LoneSites:
    """The subsampled plates that only one program has.

    Args:
        student, teacher: the traces.
        to_student: the student's names of the teacher's sites, see :func:`~pyro_kd.sites.pairing.names_in_student`.
        missing: the student's sites for which the teacher has no noise.
    """
    in_student, in_teacher = _subsampled(student), _subsampled(teacher)
    lone_in_student = [name for name in in_student if name in missing]
    lone_in_teacher = [name for name in in_teacher if to_student.get(name, name) not in in_student]
    return LoneSites(
        what="plate",
        student=lone_in_student,
        teacher=lone_in_teacher if lone_in_student else [],
        in_student=in_student,
        in_teacher=in_teacher,
    )


def _subsampled(trace: Trace) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site_is_subsample(site) and not draws_nothing(site["fn"])
    }


def undeclared_dims(batch_shape: torch.Size, plates: Iterable[Any]) -> list[int]:
    """The batch dimensions without a plate, as negative numbers. Dimensions of size 1 need no plate."""
    declared = {frame.dim for frame in plates if frame.vectorized}
    return [dim for dim in range(-len(batch_shape), 0) if batch_shape[dim] != 1 and dim not in declared]


def sizes_around(frames: Iterable[Any]) -> Sizes:
    """The sizes of plates, given as Pyro's sites hold them."""
    return {frame.name: (getattr(frame, "full_size", None) or frame.size, frame.size) for frame in frames}


def sizes_at(site: Any) -> Sizes:
    """The sizes of the plates around a sample site, or of the plate whose rows the site draws."""
    if site_is_subsample(site):
        size = site["fn"].size
        return {site["name"]: (size, site["fn"].subsample_size or size)}
    return sizes_around(site["cond_indep_stack"])


def sizes_of(trace: Trace) -> Sizes:
    """The sizes of a program's plates."""
    sizes: Sizes = {}
    for site in trace.nodes.values():
        if site["type"] == "sample":
            sizes |= sizes_at(site)
    return sizes


def differing_plates(*, student: Sizes, teacher: Sizes) -> str:
    """A clause about the plates whose sizes differ; empty if all plates that both programs have are equal."""
    clauses = []
    for name in student:
        (size, rows), (teacher_size, teacher_rows) = student[name], teacher.get(name, student[name])
        if teacher_size != size:
            clauses.append(f"plate {name!r} has size {teacher_size} in the teacher and {size} in the student")
        elif teacher_rows != rows:
            clauses.append(f"plate {name!r} takes {teacher_rows} rows in the teacher and {rows} in the student")
    return ", and ".join(clauses)


def size_error(differing: str, name: str, *, is_target: bool) -> PlateMismatchError:
    """The error if plates of different sizes have ended the student's run.

    Args:
        differing: the clause of :func:`differing_plates`.
        name: the site at which the run ended.
        is_target: whether that is a target, which cannot have noise of its own.
    """
    own = (
        f"; or, if the sizes are to differ, let the latents inside have their own noise: {advice().with_fresh(name, '...')}"
    )
    return PlateMismatchError(
        f"{differing}, so that the draws inside it, as at site {name!r}, do not belong together. Give the plate the same size in "
        f"both programs{'' if is_target or not advice().takes('fresh') else own}."
    )
