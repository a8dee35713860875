"""A run of the teacher on targets that the student has drawn, which :class:`~pyro_kd.losses.on_policy.OnPolicyKD` compares.

teacher --> its draws y; student --> its own draws y'; coins --> y or y' at each target and row
    --> the teacher again, given that history, on the same noise --> Taught
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro import poutine

from pyro_kd.isolation.effects import without_history
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.losses.forcing import Chance, Given, tossed
from pyro_kd.losses.giving import CollectingReplayMessenger
from pyro_kd.losses.paired_run import pair_up, run_student
from pyro_kd.losses.program_pair import Program, ProgramPair
from pyro_kd.losses.recording import Taught, apart, record_teacher
from pyro_kd.losses.targets import Targets, require_targets
from pyro_kd.noise.messengers import ReplayNoiseMessenger
from pyro_kd.sites.categories import recoded_value
from pyro_kd.sites.pairing import names_in_student
from pyro_kd.sites.tracing import get_trace

__all__ = ["record_on_policy"]


def record_on_policy(
    teacher: Program,
    targets: Targets,
    args: Any,
    kwargs: Mapping[str, Any],
    known: ProgramPair,
    target_values: str = "teacher",
    *,
    student: Program,
    chance_of: Callable[[str], Chance],
    site_map: Mapping[str, str],
    fresh: Collection[str],
) -> Taught:
    """Run the teacher given targets that are the student's draws where a coin says so, and its own elsewhere.

    Args:
        teacher, targets, args, kwargs, known, target_values: see :func:`~pyro_kd.losses.recording.record_teacher`.
        student: the student, which draws its targets in evaluation mode, without gradients.
        chance_of: the probability that a row of a target is the student's draw.
        site_map: student's site name -> teacher's, where they differ.
        fresh: latent sites of either program without a counterpart.
    """
    taught = record_teacher(teacher, targets, args, kwargs, known, target_values)
    names = taught.finder.names
    require_targets(names, taught.sites, targets, taught.finder.observed)
    own = tossed(taught.sites, names, chance_of)
    if not own:
        return taught
    history: dict[str, Given] = dict.fromkeys(names, True)
    for name, coins in own.items():
        history[name] = False if coins is True else ~torch.as_tensor(coins)
    replay = CollectingReplayMessenger(taught.noise, site_map, fresh)
    give = taught.giver(history, site_map, replay)
    with torch.no_grad(), poutine.block(), evaluation_mode(student):
        drawn = run_student(student, taught, replay, give, args, kwargs)
    _, error = pair_up(taught, drawn, replay, give, site_map, fresh)
    if error is not None:
        raise error
    to_student, sites = names_in_student(site_map), taught.sites
    values = {}
    for name in names:
        twin: Any = drawn.nodes[to_student.get(name, name)]
        values[name] = recoded_value(twin["value"], twin["fn"], sites[name]["fn"])
    again = poutine.condition(teacher, data=values)
    with apart(teacher), poutine.block(), ReplayNoiseMessenger(taught.noise):
        trace = get_trace(again, args, kwargs)
    return Taught.of(without_history(trace), taught.noise, taught.finder)
