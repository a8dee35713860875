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
from pyro_kd.samplers import draws_nothing
from pyro_kd.tensors import equal

__all__ = ["check_same_rows", "differing_plates", "lone_plates", "plates_of", "row_numbers", "undeclared_dims"]


def check_same_rows(teacher: Trace, student: Trace, to_student: Mapping[str, str], fresh: Container[str]) -> None:
    """Raise PlateMismatchError where a subsampled plate takes other rows in the student than in the teacher."""
    for name, site in teacher.nodes.items():
        if site["type"] != "sample" or not site_is_subsample(site) or name in fresh:
            continue
        twin: Any = student.nodes.get(to_student.get(name, name))
        if twin is None or not site_is_subsample(twin):
            continue
        rows, own = row_numbers(site), row_numbers(twin)
        if rows is None or own is None or equal(rows, own):
            continue
        if not (_are_all(rows) and _are_all(own)) and _are_valid(rows, site) and _are_valid(own, twin):
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
    return len(rows) == 0 or bool((rows.min() >= 0) & (rows.max() < plate["fn"].size))


def _are_all(rows: Tensor) -> bool:
    return torch.equal(rows, torch.arange(len(rows), device=rows.device))


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


def plates_of(trace: Trace) -> list[Any]:
    """The plates around the sample sites of a trace."""
    return [frame for site in trace.nodes.values() if site["type"] == "sample" for frame in site["cond_indep_stack"]]


def differing_plates(teacher: Iterable[Any], student: Iterable[Any]) -> str:
    """Say which plates have another size in the student: a sentence after a blank, or nothing where none has.

    Args:
        teacher: plates of the teacher, as Pyro's traces hold them.
        student: of the student.
    """
    sizes = {frame.name: frame.size for frame in teacher}
    differ = {
        frame.name: (sizes[frame.name], frame.size) for frame in student if sizes.get(frame.name, frame.size) != frame.size
    }
    return "".join(
        f" Plate {name!r} has size {mine} in the teacher and {yours} in the student."
        for name, (mine, yours) in differ.items()
    )
