"""Which sites of the two programs belong together.

Input: the compared sites of the teacher, and those of the student on the teacher's noise. Output: a :class:`Pairing`, with a
:class:`SitePair` for each site that both have. Whether the distributions of a pair can be compared is the question of
:mod:`pyro_kd.sites.compatibility`. Pairing knows sites of traces, and no divergences.
"""

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from pyro_kd.sites.categories import recoded
from pyro_kd.sites.unpaired import LoneSites
from pyro_kd.sites.weighting import unmask

__all__ = ["Pairing", "SitePair", "names_in_student", "pair_sites"]


class SitePair(NamedTuple):
    """One sample site of the teacher with its counterpart in the student.

    Attributes:
        name: the teacher's name of the site.
        is_target: whether the site is a target; else it is a latent.
        p: the teacher's distribution given its parents.
        q: the student's distribution given its parents, which are functions of the same noise. Categories have the teacher's
            coding.
        value: the teacher's draw, of shape ``batch_shape + event_shape``.
        student_value: the student's value, of the same shape. It equals ``value`` at targets.
        scale: the factor from plates and ``poutine.scale`` at the student's site: a number, or a tensor that broadcasts with
            ``batch_shape``.
        mask: the boolean mask of the student's site, which broadcasts with ``batch_shape``, or None.
        plates: the plates around the teacher's site, as Pyro's traces hold them.
        student_plates: the plates around the student's site.
        teacher_scale, teacher_mask: scale and mask of the teacher's site. That they equal the student's is checked by
            :func:`~pyro_kd.sites.compatibility.check_same_weighting`.
        is_given: whether the student is given the value, rather than drawing it on the shared noise.
        is_data: whether the value is data that the teacher observes, rather than its draw.
    """

    name: str
    is_target: bool
    p: Any
    q: Any
    value: Tensor
    student_value: Tensor
    scale: Any
    mask: Any
    plates: tuple[Any, ...]
    student_plates: tuple[Any, ...]
    teacher_scale: Any
    teacher_mask: Any
    is_given: bool = False
    is_data: bool = False

    @property
    def signature(self) -> tuple[Any, ...]:
        """Everything that the structural checks depend on."""
        p, q = self.p, self.q
        p_shapes = getattr(p, "batch_shape", None), getattr(p, "event_shape", None)
        q_shapes = getattr(q, "batch_shape", None), getattr(q, "event_shape", None)
        return (self.name, type(p), type(q), p_shapes, q_shapes)


def names_in_student(site_map: Mapping[str, str]) -> dict[str, str]:
    """Teacher's name -> student's name, of the sites whose names differ.

    A name that the student maps to a different one of the teacher's does not belong to the teacher's site of that name, if there is
    one. That site is mapped to a name which no site has.
    """
    away = {student: f"{student} (mapped to {teacher})" for student, teacher in site_map.items()}
    return away | {teacher: student for student, teacher in site_map.items()}


class Pairing(NamedTuple):
    """The sites of two programs, paired by name.

    Attributes:
        pairs: in the teacher's execution order.
        alone: the sites that only one program has although they are not fresh.
    """

    pairs: list[SitePair]
    alone: LoneSites


def pair_sites(
    *,
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    targets: Container[str],
    to_student: Mapping[str, str],
    fresh: Container[str],
) -> Pairing:
    """Pair the sites of two traces by name.

    Args:
        student: the compared sites of the student's trace on the teacher's noise and targets, by name.
        teacher: the compared sites of the teacher's trace, see :func:`~pyro_kd.sites.classification.compared_sites`.
        targets: names of the target sites, in the teacher's naming.
        to_student: the student's names of the teacher's sites, see :func:`names_in_student`.
        fresh: latent sites of either program that need no counterpart; ``"*"`` stands for all that have none.
    """
    pairs, used, alone = [], set(), list[str]()
    may_be_alone = "*" in fresh
    for name, p_site in teacher.items():
        if name in fresh and name not in targets:
            continue
        twin = to_student.get(name, name)
        if twin in student:
            used.add(twin)
            pairs.append(_pair(name, p_site, student[twin], name in targets))
        elif name in targets or not may_be_alone:
            alone.append(name)
    lone_in_student = [name for name in student if name not in used and name not in fresh and not may_be_alone]
    return Pairing(
        pairs, LoneSites(what="site", student=lone_in_student, teacher=alone, in_student=student, in_teacher=teacher)
    )


def _pair(name: str, p_site: dict[str, Any], q_site: dict[str, Any], is_target: bool) -> SitePair:
    p, p_mask = unmask(p_site["fn"], p_site["mask"])
    q, q_mask = unmask(recoded(q_site["fn"], p_site["fn"]), q_site["mask"])
    values = p_site["value"], q_site["value"]
    plates = p_site["cond_indep_stack"], q_site["cond_indep_stack"]
    weighting = q_site["scale"], q_mask, *plates, p_site["scale"], p_mask
    return SitePair(name, is_target, p, q, *values, *weighting, q_site["is_observed"], p_site["is_observed"])
