"""A warning where the rows of the teacher depend on each other by a shared draw, and those of the student cannot.

It is about teachers of :mod:`pyro_kd.teachers`, which mark the sites that hold for all rows.
"""

from typing import Any

import torch

from pyro_kd.errors import listing
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.noise.samplers import draws_nothing
from pyro_kd.noise.statements import is_statement
from pyro_kd.teachers.index import SHARED_BY_ROWS
from pyro_kd.utils.warning import warn_once

__all__ = ["warn_of_shared_draws"]


def warn_of_shared_draws(run: PairedRun, told: set[str]) -> None:
    """Warn that the student cannot learn what the rows of the teacher have in common.

    Args:
        run: a run of both programs.
        told: the warnings that were given, which are not repeated; added to.
    """
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


def _draws(trace: Any) -> list[tuple[str, Any]]:
    """The sites of a trace that draw."""
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not is_statement(site) and not draws_nothing(site["fn"])
    ]


def _batch_size(fn: Any) -> int:
    return int(getattr(fn, "batch_shape", torch.Size()).numel())
