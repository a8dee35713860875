"""The one error for all sites that stand alone in a program, with the one line that mends them. Knows names, and Pyro's sites."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyro_kd.errors import UnpairedSiteError, listing
from pyro_kd.noise.samplers import unwrapped

__all__ = ["LoneSites", "unpaired_error"]

_PATHS = "Where draws decide which sites a run has, make the deciding sites targets, so that both programs take one path."


@dataclass(frozen=True)
class LoneSites:
    """The sites, or the subsampled plates, that one program has and the other lacks.

    Attributes:
        what: ``"site"`` or ``"plate"``.
        teacher, student: names in the program that has them.
        in_teacher, in_student: all sites of that sort, by name.
    """

    what: str
    teacher: Sequence[str]
    student: Sequence[str]
    in_teacher: Mapping[str, Any]
    in_student: Mapping[str, Any]

    def __bool__(self) -> bool:
        return bool(self.teacher or self.student)

    def sentences(self) -> list[str]:
        """What is alone where."""
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
        """Student's name -> teacher's, where two are likely one variable.

        That is by like names; and by like distributions where one is left of each, or where it is a target, which cannot stand alone.
        """
        found, teacher = dict[str, str](), list(self.teacher)
        for name in self.student:
            for close in difflib.get_close_matches(name, teacher, n=1):
                found[name] = close
                teacher.remove(close)
        student = [name for name in self.student if name not in found]
        is_single = len(student) == len(teacher) == 1
        for name in [name for name in teacher if is_single or name in targets]:
            alike = [own for own in student if self._is_alike(own, name)]
            if alike:
                found[alike[0]] = name
                student.remove(alike[0])
        return found

    def _is_alike(self, student: str, teacher: str) -> bool:
        mine, yours = self.in_student[student]["fn"], self.in_teacher[teacher]["fn"]
        return type(unwrapped(mine)) is type(unwrapped(yours)) and getattr(mine, "event_shape", ()) == getattr(
            yours, "event_shape", ()
        )


def unpaired_error(
    groups: Sequence[LoneSites],
    targets: Collection[str],
    site_map: Mapping[str, str],
    fresh: Collection[str],
    plates: str,
) -> UnpairedSiteError:
    """The error.

    Args:
        groups: the lone sites and plates.
        targets: which of the teacher's sites are targets; these cannot stand alone.
        site_map, fresh: as the loss has them: the line to write keeps them.
        plates: what is to be said of plates that differ.
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
    advice = f"give the loss {', '.join(options)}" if options else "leave that out of site_map"
    if mapped and matches:
        advice += f"; {listing(matches)} taken for {listing(matches.values())} (each is a variable of its own: fresh=[...])"
    elif not lost:
        advice += " (one variable under two names: site_map={'student_name': 'teacher_name'})"
    sentences = [sentence for group in groups for sentence in group.sentences()]
    for own, name in void.items():
        lacking, lacks = ("student", own) if own not in students else ("teacher", name)
        sentences.append(f"site_map has {own!r}: {name!r}, where {lacks!r} is none of the {lacking}'s")
    return UnpairedSiteError(
        f"{', and '.join(sentences)}{plates and f' ({plates})'}. Name them alike in both programs, or {advice}. {_PATHS}"
    )


def _named(what: str, names: Sequence[str]) -> str:
    return f"{what} {names[0]!r} is" if len(names) == 1 else f"{what}s {listing(names)} are"
