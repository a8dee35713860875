"""Which values the student is given, for the options of a loss: the targets, what the loss gives, and what coins give.

A value is given only where its distribution is compared, or the loss would no longer be a bound.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch

from pyro_kd.losses.discrete_gradients.choice import DiscreteGradients
from pyro_kd.losses.forcing import Chance, Given, Latents, advised, chance_option, tossed
from pyro_kd.losses.paired_run import PairedRun, as_mapping
from pyro_kd.losses.program_pair import Program
from pyro_kd.losses.recording import Taught, record_teacher
from pyro_kd.losses.student_history import record_on_policy
from pyro_kd.losses.targets import probability_of, weight_of
from pyro_kd.losses.terms import SiteTerm
from pyro_kd.sites.pairing import names_in_student
from pyro_kd.sites.weighting import compared_elements
from pyro_kd.utils.user_code import called

__all__ = ["given_values", "latents_of", "recorder"]


def given_values(
    loss: Any,
    gradients: DiscreteGradients,
    sites: Mapping[str, Any],
    targets: Collection[str],
    latents: Latents | None = None,
    chance_of: Callable[[str], Chance] | None = None,
) -> dict[str, Given]:
    """What the student is given: what the loss gives, and what the coins of teacher forcing give, where it is compared.

    Args:
        loss: the loss, for its options.
        gradients: which gradients pass through the student's discrete draws.
        sites: the teacher's sites, by name.
        targets: names of the targets among them.
        latents: what is known about them, where the user leaves teacher forcing open or schedules it; None before the first run.
        chance_of: the probability of teacher forcing at a site, instead of the loss's.
    """
    weight, option = loss.given_weight, "given_weight"
    if weight is None:
        weight, option = loss.latent_weight, "latent_weight"

    def is_compared(name: str) -> bool:
        if _may_lack(name, weight, loss):
            return False
        return compared_elements(sites[name]) is not False and weight_of(name, weight, option=option) != 0

    what = f"{type(loss).__name__}.given_sites"
    chosen = as_mapping(called(loss.given_sites, what, "given_sites(teacher, targets)", sites, targets), sites, targets)
    given = {name: which for name, which in chosen.items() if name in targets or is_compared(name)}
    chance_of = chance_of or _chance_of(loss, "teacher_forcing")
    if chance_of is None:
        return given
    if loss.teacher_forcing is None or "teacher_forcing" in loss.scheduled:
        to_student = names_in_student(loss.site_map)
        cut = [name for name in sites if gradients.at(to_student.get(name, name), sites[name]["fn"]) == "cut"]
        if loss.teacher_forcing is not None:  # a schedule: what would have neither a term nor a gradient stays given
            cut = [name for name in cut if name not in targets and weight_of(name, loss.latent_weight) == 0]
            latents = None if latents is None else latents._replace(givable=frozenset(sites))
        chance_of = advised({name: sites[name] for name in cut}, latents, chance_of)
    rest = [name for name in sites if name not in chosen and name not in loss.fresh and is_compared(name)]
    rest = [name for name in rest if not _may_lack(name, loss.teacher_forcing, loss)]
    return given | tossed(sites, rest, chance_of)


def latents_of(run: PairedRun, terms: Collection[SiteTerm], gradients: DiscreteGradients) -> Latents:
    """What a run shows about the latents of both programs.

    Args:
        run: the run.
        terms: the terms of all sites that can be compared.
        gradients: which gradients pass through the student's discrete draws.
    """
    names = names_in_student(gradients.site_map)
    latents = [pair for pair in run.pairs if not pair.is_target]
    cut = [pair.name for pair in latents if gradients.cuts(names.get(pair.name, pair.name), pair.q)]
    return Latents(frozenset(term.site for term in terms), frozenset(cut))


def recorder(loss: Any, student: Program, chance_of: Callable[[str], Chance] | None = None) -> Callable[..., Taught]:
    """How the teacher is run: as it is, or given a history of the student's.

    Args:
        loss: the loss, for its options.
        student: the student.
        chance_of: the probability that a row of a target is the student's draw, instead of the loss's.
    """
    chance_of = chance_of or _chance_of(loss, "student_fraction")
    if chance_of is None:
        return record_teacher
    return partial(record_on_policy, student=student, chance_of=chance_of, site_map=loss.site_map, fresh=loss.fresh)


def _may_lack(name: str, option: Any, loss: Any) -> bool:
    """Whether a mapping has no entry for a site that may be in one program only."""
    return "*" in loss.fresh and isinstance(option, Mapping) and name not in option


def _chance_of(loss: Any, option: str) -> Callable[[str], Chance] | None:
    """A probability as a function of the site's name; None where it is 0 at all sites and stays so."""
    value, is_scheduled = chance_option(loss, option), option in loss.scheduled
    is_open = getattr(loss, option) is None
    if isinstance(value, float | int) and value == 0 and not is_scheduled and not is_open:
        return None

    def chance_of(site: str) -> Chance:
        chance = probability_of(site, value, option=option)
        return torch.tensor(chance) if is_scheduled else chance

    return chance_of
