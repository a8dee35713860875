"""Point masses that no term covers, although they are left out as functions of a draw that is compared."""

from collections.abc import Mapping
from typing import Any

import torch

from pyro_kd.errors import UnpairedSiteError, listing
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.sites.classification import covered_points

__all__ = ["check_left_out"]


def check_left_out(run: PairedRun, to_student: Mapping[str, str]) -> None:
    """Raise where equal draws give different point masses: these depend on what no term compares, such as a guide's trained scales.

    It can be seen only in a run in which the two programs have the same draws.

    Args:
        run: a run of both programs.
        to_student: the student's names of the sites that have other names there.

    Raises:
        UnpairedSiteError: a point mass differs.
    """
    draws = [pair.name for pair in run.pairs]
    points = covered_points(run.teacher, draws)
    own = covered_points(run.student, [to_student.get(name, name) for name in draws])
    common = [name for name in points if to_student.get(name, name) in own]
    if not common or not all(_is_equal(run, name, to_student) for name in draws):
        return
    different = [name for name in common if not _is_equal(run, name, to_student)]
    if different:
        raise UnpairedSiteError(
            f"on equal draws, the student has other values than the teacher at {listing(different)}. The loss leaves these point "
            f"masses out as functions of the draws {listing(draws)} alone. They depend on parameters too, which would not be "
            f"trained. Make them targets in place of the draws: targets={different}."
        )


def _is_equal(run: PairedRun, name: str, to_student: Mapping[str, str]) -> bool:
    values: list[Any] = [run.teacher.nodes[name]["value"], run.student.nodes[to_student.get(name, name)]["value"]]
    first, second = (torch.as_tensor(value).detach() for value in values)
    return first.shape == second.shape and torch.allclose(first, second.to(first), rtol=1e-4, atol=1e-6, equal_nan=True)
