"""One error for all sites that only one of the programs has, with the one line that mends them all. Knows names and Pyro's sites."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyro_kd.errors import UnpairedSiteError, listing
from pyro_kd.noise.samplers import unwrapped
from pyro_kd.utils.advice import advice

__all__ = ["LoneSites", "unpaired_error"]

_PATHS = "If draws decide which sites a run has, make the deciding sites targets, so that both programs take the same path."


@dataclass(frozen=True, kw_only=True)
class LoneSites:
    """The sites, or the subsampled plates, that only one of the programs has.

    Attributes:
        what: ``"site"`` or ``"plate"``.
        student, teacher: their names in the program that has them.
        in_student, in_teacher: all sites or subsampled plates of a program, by name.
    """

    what: str
    student: Sequence[str]
    teacher: Sequence[str]
    in_student: Mapping[str, Any]
    in_teacher: Mapping[str, Any]

    def __bool__(self) -> bool:
        return bool(self.student or self.teacher)

    def sentences(self) -> list[str]:
        """What only one program has, and what the other one has instead."""
        # A plate whose rows are given has nothing to share.
        lacks_what = "the {} has" if self.what == "site" else "plates that draw their rows in the {}:"
        sides = [
            ("teacher", self.teacher, "student", self.in_student),
            ("student", self.student, "teacher", self.in_teacher),
        ]
        return [
            f"{_named(self.what, names)} in the {has} only; {lacks_what.format(lacks)} {listing(others)}"
            for has, names, lacks, others in sides
            if names
        ]

    def matches(self, targets: Collection[str]) -> dict[str, str]:
        """Student's name -> teacher's name, of sites that are likely the same variable.

        They have similar names; or distributions of one family and event shape, if a single site is left in each program, or the
        teacher's is a target, which must have a counterpart.
        """
        found, teacher = dict[str, str](), list(self.teacher)
        for name in self.student:
            for close in difflib.get_close_matches(name, teacher, n=1):
                found[name] = close
                teacher.remove(close)
        student = [name for name in self.student if name not in found]
        is_single = len(student) == len(teacher) == 1
        for name in [name for name in teacher if is_single or name in targets]:
            similar = [own for own in student if self._is_similar(own, name)]
            if similar:
                found[similar[0]] = name
                student.remove(similar[0])
        return found

    def _is_similar(self, student: str, teacher: str) -> bool:
        q, p = self.in_student[student]["fn"], self.in_teacher[teacher]["fn"]
        same_family = type(unwrapped(q)) is type(unwrapped(p))
        return same_family and getattr(q, "event_shape", ()) == getattr(p, "event_shape", ())


def unpaired_error(
    groups: Sequence[LoneSites],
    *,
    targets: Collection[str],
    site_map: Mapping[str, str],
    fresh: Collection[str],
    plates: str,
) -> UnpairedSiteError:
    """The error about all lone sites and plates.

    Args:
        groups: the lone sites and plates.
        targets: the teacher's target sites, which must have counterparts.
        site_map, fresh: the options of the loss, which the advice keeps.
        plates: a clause about plates that differ; may be empty.
    """
    matches = {student: teacher for group in groups for student, teacher in group.matches(targets).items()}
    alone = [
        name
        for group in groups
        for name in (*group.teacher, *group.student)
        if name not in matches and name not in matches.values() and name not in targets
    ]
    lost = [name for group in groups for name in group.teacher if name in targets and name not in matches.values()]
    teachers, students = (
        {name for group in groups for name in getattr(group, side)} for side in ("in_teacher", "in_student")
    )
    void = {own: name for own, name in site_map.items() if own not in students or name not in teachers}
    kept = {own: name for own, name in site_map.items() if own not in void}
    mapped = (
        kept
        | {own: name for own, name in matches.items() if own != name}
        | ({"its name in the student": lost[0]} if lost else {})
    )
    options = []
    if mapped and (matches or lost or void):
        options.append(f"site_map={mapped}")
    if alone:
        options.append(f"fresh={[*fresh, *dict.fromkeys(alone)]}")
    way = f"give {advice().taker} {', '.join(options)}" if options else "leave that out of site_map"
    if mapped and matches:
        way += f"; {listing(matches)} taken for {listing(matches.values())}"
        latents = [name for pair in matches.items() for name in pair if pair[1] not in targets]
        if latents:
            way += f" (if they are different variables: {advice().with_fresh(*alone, *latents)})"
    elif not lost:
        way += " (if one variable has two names: site_map={'student_name': 'teacher_name'})"
    wanted = [*lost, *(name for name in matches.values() if name in targets)]
    if wanted:
        way += f". A target must be in both programs: if the student lacks {listing(wanted)}, add pyro.sample({wanted[0]!r}, ...)"
    sentences = [sentence for group in groups for sentence in group.sentences()]
    for own, name in void.items():
        lacking, lacks = ("student", own) if own not in students else ("teacher", name)
        sentences.append(f"site_map has {own!r}: {name!r}, but the {lacking} has no site {lacks!r}")
    return UnpairedSiteError(
        f"{', and '.join(sentences)}{plates and f' ({plates})'}. Give them the same names in both programs, or {way}. {_PATHS}"
    )


def _named(what: str, names: Sequence[str]) -> str:
    return f"{what} {names[0]!r} is" if len(names) == 1 else f"{what}s {listing(names)} are"
