"""Warnings about draws that the two programs do not share, where the student would lose a part of the teacher's law.

One is about rows that depend on each other by a draw of the teacher. It holds for teachers of :mod:`pyro_kd.teachers`, which mark
the sites that hold for all rows. The other is about targets that are point masses, functions of the draws before them.
"""

from typing import Any

import torch

from pyro_kd.errors import listing
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.noise.point_masses import is_point
from pyro_kd.noise.samplers import draws_nothing
from pyro_kd.noise.statements import is_statement
from pyro_kd.teachers.index import SHARED_BY_ROWS
from pyro_kd.utils.warning import warn_once

__all__ = ["warn_of_shared_draws"]


def warn_of_shared_draws(run: PairedRun, told: set[str]) -> None:
    """Warn that the student cannot learn what the rows of the teacher have in common, or how far a target spreads.

    Args:
        run: a run of both programs.
        told: the warnings that were given, which are not repeated; added to.
    """
    _warn_of_lost_spread(run, told)
    _warn_of_guided_targets(run, told)
    paired = {pair.name for pair in run.pairs}
    shared = [name for name, site in _draws(run.teacher) if site["infer"].get(SHARED_BY_ROWS) and name not in paired]
    if not shared:
        return
    size = max(_batch_size(run.teacher.nodes[name]["fn"]) for name in shared)
    targets = [pair for pair in run.pairs if pair.is_target and _batch_size(pair.p) > size]
    rows = min((_batch_size(pair.q) for pair in targets), default=0)
    if not targets or any(_batch_size(site["fn"]) < rows for _, site in _draws(run.student)):
        return
    text = (
        f"the rows of {listing(pair.name for pair in targets)} share {listing(shared)} in the teacher, and nothing in the student. "
        "The student can learn the law of each row, and loses what the rows have in common. If you need the law of single rows, "
        "let each row have its own draw, which has less variance: rows=len (rows=int where the argument is the number of rows). "
        "Otherwise give the student a latent outside of the plate of rows. To keep one draw for all rows without this warning: "
        "warnings.filterwarnings('ignore', 'the rows of')."
    )
    warn_once(text, told)


def _warn_of_guided_targets(run: PairedRun, told: set[str]) -> None:
    """Warn of targets that a posterior predictive takes from a guide, in place of the model given the guide's latents."""
    # A posterior predictive marks the sites of its guide, and Pyro's GuideMessenger leaves the law of the model there.
    of_guide = [(pair.name, run.teacher.nodes[pair.name]["infer"] or {}) for pair in run.pairs if pair.is_target]
    names = [name for name, infer in of_guide if SHARED_BY_ROWS in infer and "prior" in infer]
    if names:
        text = (
            f"the teacher's targets {listing(names)} are drawn by its guide, and not by its model: a messenger guide of Pyro gives "
            "a posterior to every site that the call does not observe. If they were data when the guide was trained, pass the data "
            "in each call: the targets are drawn all the same. If they are latents, ignore this: "
            "warnings.filterwarnings('ignore', \"the teacher's targets\")."
        )
        warn_once(text, told)


def _warn_of_lost_spread(run: PairedRun, told: set[str]) -> None:
    """Warn of targets that are point masses in both programs, if latents before them draw noise of their own.

    Given noise that is not shared, the squared distance is least where the student gives the mean of the teacher's values.
    """
    points = [pair.name for pair in run.pairs if pair.is_target and is_point(pair.p) and is_point(pair.q)]
    if not points:
        return
    names, laws = {pair.name for pair in run.pairs}, {id(pair.q) for pair in run.pairs}
    own = [name for name, _ in _draws(run.teacher) if name not in names]
    own += [name for name, site in _draws(run.student) if name not in names and id(site["fn"]) not in laws]
    if not own:
        return
    text = (
        f"targets that are point masses (Delta) in both programs, {listing(points)}, are compared by their squared distance, but "
        f"{listing(dict.fromkeys(own))} draw noise that is not shared. If the targets depend on them, the student learns the mean of "
        "the teacher's values, and loses their spread. Make targets of the draws that they are functions of, pair these by site_map, "
        "or give the student a density at the targets and train it by DrawsKD. If the targets do not depend on them, ignore "
        "this: warnings.filterwarnings('ignore', 'targets that are point masses')."
    )
    warn_once(text, told)


def _draws(trace: Any) -> list[tuple[str, Any]]:
    """The sites of a trace that draw."""
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not is_statement(site) and not draws_nothing(site["fn"])
    ]


def _batch_size(fn: Any) -> int:
    return int(getattr(fn, "batch_shape", torch.Size()).numel())
