"""Which sites of the two programs belong together, and whether they can be compared.

Input: the trace of the teacher, and that of the student on the teacher's noise. Output: a list of :class:`SitePair` in
the teacher's execution order, with the plain distributions, the teacher's draw, and the scale and mask that both
programs agree on. Pairing knows traces and no divergences.
"""

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from pyro_kd.sites.categories import recoded
from pyro_kd.sites.weighting import unmask

__all__ = ["SitePair", "names_in_student", "pair_sites"]


class SitePair(NamedTuple):
    """One sample site of the teacher with its counterpart in the student.

    Attributes:
        name: the teacher's name of the site.
        is_target: whether the site is a target; else it is a latent.
        p: the teacher's distribution given its parents.
        q: the student's distribution given its parents, which are functions of the same noise; categories in the teacher's
            coding.
        value: the teacher's draw, of shape ``batch_shape + event_shape``.
        student_value: the student's value: equal to ``value`` at targets.
        scale: the factor that plates and ``poutine.scale`` put on the student's site; :func:`check_same_weighting`.
        mask: boolean mask of the student's site over ``batch_shape``, or None; likewise.
        teacher_scale, teacher_mask: the teacher's.
        plates: the plates around the teacher's site, as Pyro's traces hold them.
        student_plates: around the student's.
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

    @property
    def signature(self) -> tuple[Any, ...]:
        """What the structural checks depend on."""
        p, q = self.p, self.q
        p_shapes = getattr(p, "batch_shape", None), getattr(p, "event_shape", None)
        q_shapes = getattr(q, "batch_shape", None), getattr(q, "event_shape", None)
        return (self.name, type(p), type(q), p_shapes, q_shapes)


def names_in_student(site_map: Mapping[str, str]) -> dict[str, str]:
    """The student's name of each of the teacher's sites, where it is another one.

    A name that the student maps away belongs to no site of the teacher's of that name: it gets one that no site has.
    """
    away = {student: f"{student} (mapped to {teacher})" for student, teacher in site_map.items()}
    return away | {teacher: student for student, teacher in site_map.items()}


def pair_sites(
    p_sites: Mapping[str, Any],
    q_sites: Mapping[str, Any],
    targets: Container[str],
    to_student: Mapping[str, str],
    fresh: Container[str],
) -> tuple[list[SitePair], list[str], list[str]]:
    """Pair the sites of two traces by name.

    Args:
        p_sites: the teacher's :func:`compared_sites`.
        q_sites: the student's, run on the teacher's noise and targets.
        targets: names of the target sites, in the teacher's naming.
        to_student: :func:`names_in_student`.
        fresh: latent sites of either program that stand alone.

    Returns:
        The pairs, and the sites that the teacher, and that the student, has alone although they are not fresh.
    """
    pairs, used, alone = [], set(), list[str]()
    for name, p_site in p_sites.items():
        if name in fresh and name not in targets:
            continue
        twin = to_student.get(name, name)
        if twin in q_sites:
            used.add(twin)
            pairs.append(_pair(name, p_site, q_sites[twin], name in targets))
        else:
            alone.append(name)
    return pairs, alone, [name for name in q_sites if name not in used and name not in fresh]


def _pair(name: str, p_site: dict[str, Any], q_site: dict[str, Any], is_target: bool) -> SitePair:
    p, p_mask = unmask(p_site["fn"], p_site["mask"])
    q, q_mask = unmask(recoded(q_site["fn"], p_site["fn"]), q_site["mask"])
    values = p_site["value"], q_site["value"]
    plates = p_site["cond_indep_stack"], q_site["cond_indep_stack"]
    return SitePair(name, is_target, p, q, *values, q_site["scale"], q_mask, *plates, p_site["scale"], p_mask)
