"""The plates of two programs: whether they take the same rows, have the same sizes, and are there in both.

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
from pyro_kd.utils import guards

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
"""By name of a plate: its size, and how many of its rows are taken."""


def check_same_rows(teacher: Trace, student: Trace, to_student: Mapping[str, str], fresh: Container[str]) -> None:
    """Raise PlateMismatchError where a subsampled plate takes other rows in the student than in the teacher."""
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
                f"plate {name!r} takes other rows in the student than in the teacher, so that the draws inside it do not belong "
                "together. Give both the same subsample=, or neither: then they share the noise behind the rows."
            )


def row_numbers(plate: Any) -> Tensor | None:
    """The rows that a plate takes, or None where its subsample is no list of whole numbers: then it is a value like any."""
    try:
        rows = torch.as_tensor(plate["value"])
    except (TypeError, ValueError, RuntimeError):
        return None
    is_whole = not (rows.is_floating_point() or rows.is_complex() or rows.dtype is torch.bool)
    return rows if is_whole and rows.dim() == 1 else None


def _are_valid(rows: Tensor, plate: Any) -> bool:
    """Whether a plate has rows of these numbers; counts that are data may be larger."""
    return len(rows) == 0 or guards.holds((rows >= 0) & (rows < plate["fn"].size), "the rows of a plate are valid")


def _are_all(rows: Tensor, plate: Any) -> bool:
    if is_whole_plate(plate):
        return True
    return guards.equal(rows, torch.arange(len(rows), device=rows.device), "a plate takes its first rows in order")


def lone_plates(
    teacher: Trace, student: Trace, to_student: Mapping[str, str], missing: Container[str]
) -> tuple[list[str], list[str], dict[str, Any], dict[str, Any]]:
    """The plates that subsample which one program has alone: names in the teacher, in the student; and all such plates of each.

    Args:
        teacher, student: the traces.
        to_student: :func:`names_in_student`.
        missing: the student's sites that the teacher has no noise for.
    """
    mine, yours = _subsampled(teacher), _subsampled(student)
    alone = [name for name in yours if name in missing]
    lacking = [name for name in mine if to_student.get(name, name) not in yours]
    return lacking if alone else [], alone, mine, yours


def _subsampled(trace: Trace) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site_is_subsample(site) and not draws_nothing(site["fn"])
    }


def undeclared_dims(batch_shape: torch.Size, plates: Iterable[Any]) -> list[int]:
    """The batch dimensions, counted from the right, that no plate declares; those of size 1 need none."""
    declared = {frame.dim for frame in plates if frame.vectorized}
    return [dim for dim in range(-len(batch_shape), 0) if batch_shape[dim] != 1 and dim not in declared]


def sizes_around(frames: Iterable[Any]) -> Sizes:
    """The sizes of plates, as Pyro's sites hold them."""
    return {frame.name: (getattr(frame, "full_size", None) or frame.size, frame.size) for frame in frames}


def sizes_at(site: Any) -> Sizes:
    """The sizes of the plates around a sample site, or of the plate whose rows it draws."""
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


def differing_plates(teacher: Sizes, student: Sizes) -> str:
    """Say which plates have another size in the student, in a clause; an empty one where none has."""
    clauses = []
    for name in student:
        mine, yours = teacher.get(name, student[name]), student[name]
        if mine[0] != yours[0]:
            clauses.append(f"plate {name!r} has size {mine[0]} in the teacher and {yours[0]} in the student")
        elif mine[1] != yours[1]:
            clauses.append(f"plate {name!r} takes {mine[1]} rows in the teacher and {yours[1]} in the student")
    return ", and ".join(clauses)


def size_error(differing: str, name: str) -> PlateMismatchError:
    """The error where plates of other sizes have ended the student's run.

    Args:
        differing: of :func:`differing_plates`.
        name: the site at which it ended.
    """
    return PlateMismatchError(
        f"{differing}, so that the draws inside it, as at site {name!r}, do not belong together. Give the plate one size in both "
        f"programs; or, where the sizes are to differ, let what the student draws inside have noise of its own: "
        f"fresh=[{name!r}, ...]."
    )
