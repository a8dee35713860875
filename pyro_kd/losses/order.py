"""A warning where the sites that the student is given stand in a different order in the two programs.

The divergences of conditional distributions add up to one of the joint distribution if both programs are factorised alike: each site
given those before it (the chain rule of the KL). With y2 given y1 in the teacher and y1 given y2 in the student they do not, and the
sum may even be below the KL.
"""

from collections.abc import Mapping
from itertools import pairwise

from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.utils.warning import warn_once

__all__ = ["in_different_order", "warn_of_order"]


def in_different_order(run: PairedRun, to_student: Mapping[str, str]) -> tuple[str, str] | None:
    """Two given sites, by the teacher's names, that the student has the other way round; None where there are none.

    Args:
        run: a run of both programs.
        to_student: the student's names of the teacher's sites, where they differ.
    """
    places = {name: place for place, name in enumerate(run.student.nodes)}
    given = [pair.name for pair in run.pairs if pair.is_target or pair.name in run.given]
    for before, after in pairwise(given):
        if places[to_student.get(before, before)] > places[to_student.get(after, after)]:
            return before, after
    return None


def warn_of_order(run: PairedRun, to_student: Mapping[str, str], told: set[str]) -> None:
    """Warn that the loss is no bound unless the sites are independent.

    Args:
        run, to_student: as for :func:`in_different_order`.
        told: the warnings that were given, which are not repeated; added to.
    """
    found = in_different_order(run, to_student)
    if found is None:
        return
    first, second = found
    text = (
        f"the teacher has site {first!r} before {second!r}, and the student has {second!r} first. If one of them depends on the "
        "other, the loss is no bound on the KL of both together, and pulls the student away from the teacher's joint law. Write the "
        "student in the teacher's order. MarginalKD compares the joint laws in any order. If they are independent, ignore this: "
        "warnings.filterwarnings('ignore', 'the teacher has site')."
    )
    warn_once(text, told)
