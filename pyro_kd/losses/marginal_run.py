"""One run of teacher and student on all states of their latents: the exact law of the targets in both programs.

    teacher --draws y--> Taught --> both programs: given y, latents enumerated --> Enumerated, Enumerated --> MarginalRun

The latents need no counterparts, and no noise is shared. Used by :class:`~pyro_kd.losses.marginal.MarginalKD` and by
:func:`~pyro_kd.metrics.marginal_kl`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_kd.errors import PlateMismatchError, SupportMismatchError, listing
from pyro_kd.isolation.freezing import is_frozen
from pyro_kd.losses.given_programs import GivenPrograms
from pyro_kd.losses.ownership import check_no_shared_parameters
from pyro_kd.losses.paired_run import PairedRun, check_inputs, hinting_at_swapped, run_pair
from pyro_kd.losses.posterior import expected_log_ratio
from pyro_kd.losses.program_pair import Program, ProgramPair
from pyro_kd.losses.recording import Taught, record_teacher
from pyro_kd.losses.targets import Targets, require_targets
from pyro_kd.noise.point_masses import is_discrete, is_point
from pyro_kd.sites.compatibility import check_same_weighting
from pyro_kd.sites.enumeration import MAX_STATES, Enumerated
from pyro_kd.sites.pairing import SitePair, names_in_student
from pyro_kd.sites.weighting import compared_elements
from pyro_kd.utils import guards
from pyro_kd.utils.advice import advice

__all__ = ["MarginalRun", "run_marginals"]


@dataclass
class MarginalRun(PairedRun):
    """A run of both programs on all states of their latents.

    Attributes:
        p, q: the enumerated runs of teacher and student. ``p`` is None if the teacher's density is left out.
        keep: the plates that hold all sites of both programs, by the teacher's names.
        to_student: the student's names of the teacher's sites.
        plates: the student's names of the plates in ``keep``.
        num_enumerated: the number of targets whose states are enumerated too.
        given_all: the student on all values of the same run of the teacher, as for local distillation, where it is needed.
    """

    p: Enumerated | None = None
    q: Enumerated = field(default=None)  # type: ignore[assignment]
    keep: Sequence[str] = ()
    to_student: Mapping[str, str] = field(default_factory=dict)
    plates: Mapping[str, str] = field(default_factory=dict)
    num_enumerated: int = 0
    given_all: PairedRun | None = None

    @property
    def targets(self) -> list[str]:
        """The names of the targets, in the teacher's order."""
        return [pair.name for pair in self.pairs]

    @property
    def scale(self) -> Any:
        """The factor of each row, from subsampled plates and ``poutine.scale``."""
        return self.q.scale

    @property
    def has_one_order(self) -> bool:
        """Whether both programs have the targets in the same order."""
        twins = [self.to_student.get(name, name) for name in self.targets]
        return twins == [name for name in self.q.factors if name in twins]

    def log_densities(self, targets: Collection[str]) -> tuple[Tensor, Tensor]:
        r"""The exact :math:`\log p(y)` and :math:`\log q(y)` of some of the targets.

        Args:
            targets: the first targets, in the order of both programs: later ones are left out, and earlier ones are needed.

        Returns:
            Two tensors of the shape of the enumerated targets, then of the plates in ``keep``. The first is 0 where the teacher's
            density is left out.
        """
        without = [name for name in self.targets if name not in targets]
        log_q = self.q.log_marginal(
            [self.plates[name] for name in self.keep], [self.to_student.get(name, name) for name in without]
        )
        if self.p is None:
            return torch.zeros_like(log_q), log_q
        with torch.no_grad():
            return self.p.log_marginal(self.keep, without), log_q

    def expected_log_ratio(self) -> Tensor:
        r"""The sum over rows of :math:`E_{z \sim p(z | y)}[\log p(z, y) - \log q(z, y)]`, by the teacher's exact posterior.

        Raises:
            UnsupportedDivergenceError: the latents of the programs have no common states.
        """
        assert self.p is not None
        return expected_log_ratio(self.p, self.q, self.keep, self.to_student)


def run_marginals(
    student: Program,
    teacher: Program,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    targets: Targets = None,
    site_map: Mapping[str, str] | None = None,
    record: Callable[..., Taught] = record_teacher,
    known: ProgramPair | None = None,
    max_states: int = MAX_STATES,
    enumerate_targets: bool = False,
    has_teacher: bool = True,
    gives_all: bool = False,
) -> MarginalRun:
    """Draw the targets from the teacher, and run both programs on all states of their latents.

    Args:
        student, teacher: the programs.
        args, kwargs: arguments of both.
        targets: names of the target sites, a predicate on Pyro's site dictionaries, or None for the sites that the teacher observes.
        site_map: student's site name -> teacher's, where they differ.
        record: runs the teacher, see :func:`~pyro_kd.losses.recording.record_teacher`.
        known: what earlier runs have shown about the two programs.
        max_states: the largest number of elements that one table of densities may have.
        enumerate_targets: take all values of the targets, and not the drawn ones.
        has_teacher: whether the teacher's density is needed. Otherwise its latents may be of any kind.
        gives_all: whether to run the student on all values of the teacher's run, too.

    Raises:
        NoTargetsError, UnknownTargetError: there are no targets, or a target is not a site.
        UnpairedSiteError: the student lacks a target.
        SupportMismatchError: a target is over different values in the two programs.
        UnsupportedDivergenceError: a latent cannot be enumerated, there are too many states, or a program does not broadcast.
        PlateMismatchError: plates differ, or hold latents that cannot be summed out one plate after the other.
        ObservedValueError: an observed value depends on what is trained, or differs between the programs.
        SharedParameterError: a parameter belongs to both programs.
    """
    kwargs, to_student = dict(kwargs or {}), names_in_student(site_map or {})
    known = ProgramPair(student, teacher) if known is None else known
    known.between.begin()
    with hinting_at_swapped(student):
        taught = record(teacher, targets, args, kwargs, known)
        require_targets(taught.finder.names, taught.sites, targets, taught.finder.observed)
        if known.between.looks:
            known.between.note(taught.noise, [], is_fresh=True)  # no noise is shared, so there is nothing to warn of
        names = [name for name in taught.sites if name in taught.finder.names]
        both = GivenPrograms(
            student, teacher, args, kwargs, taught, names, dict(site_map or {}), known, max_states, has_teacher
        )
        nesting, given = both.surveyed(enumerate_targets)
        p = both.teacher_run(nesting, given) if has_teacher else None
        with known.autograd_in_student():
            q, give = both.student_run(nesting, given)
        pairs = both.pairs(q.trace)
        for pair in pairs:
            check_same_weighting(pair)
            if has_teacher:
                _check_densities(pair)
        check_inputs(taught, q.trace, give, dict(site_map or {}), (), (args, kwargs))
        if not is_frozen(known.teacher):
            check_no_shared_parameters(q.trace, taught.trace, known.student, known.teacher)
        plates = _common(p, q, to_student, taught, names)
        if given:
            _check_given(pairs, plates)
        given_all = None
        if gives_all:
            options: dict[str, Any] = {"targets": targets, "site_map": site_map, "known": known}
            given_all = run_pair(
                student, teacher, args, kwargs, record=lambda *_: taught, given_sites=lambda sites, _: sites, **options
            )
    return MarginalRun(
        pairs,
        q.trace,
        taught.trace,
        taught.noise,
        p=p,
        q=q,
        keep=list(plates),
        to_student=to_student,
        plates=plates,
        num_enumerated=len(given),
        given_all=given_all,
    )


def _common(
    p: Enumerated | None, q: Enumerated, to_student: Mapping[str, str], taught: Taught, names: Collection[str]
) -> dict[str, str]:
    """The plates that hold all sites of both programs: the teacher's name -> the student's.

    Plates are paired by name, and otherwise by dimension and size, since independent rows are rows under any name.
    """
    if p is None:
        held = [{f.name: (f.dim, f.size) for f in taught.sites[n]["cond_indep_stack"] if f.vectorized} for n in names]
        places = {plate: place for plate, place in held[0].items() if all(plate in plates for plates in held)}
    else:
        places = {plate: (p.plates[plate].dim, p.plates[plate].size) for plate in p.common_plates}
    mine = {(q.plates[plate].dim, q.plates[plate].size): plate for plate in q.common_plates}
    found = {}
    for plate, place in places.items():
        twin = to_student.get(plate, plate)
        if twin in q.common_plates:
            found[plate] = twin
        elif place in mine and mine[place] not in places:
            found[plate] = mine[place]
    return found


def _check_densities(pair: SitePair) -> None:
    """Raise SupportMismatchError where a target is a point mass in one program and has a density in the other."""
    way = (
        ". cross_entropy=True fits the student's density to the teacher's values" if advice().takes("cross_entropy") else ""
    )
    for first, second, whose in ((pair.p, pair.q, "teacher"), (pair.q, pair.p, "student")):
        if is_point(first) and not is_point(second) and not is_discrete(second):
            raise SupportMismatchError(
                f"target {pair.name!r} is a point mass in the {whose} and has a density in the other program, so that their KL is "
                f"infinite{way}."
            )


def _check_given(pairs: Sequence[SitePair], keep: Collection[str]) -> None:
    for pair in pairs:
        counts = compared_elements({"fn": pair.p, "mask": pair.mask, "scale": pair.scale})
        if counts is not True and not guards.holds(torch.as_tensor(counts), f"no mask hides target {pair.name!r}"):
            raise PlateMismatchError(
                f"a mask, or a scale of 0, hides elements of target {pair.name!r}, whose values then are an input and not to be "
                "enumerated. Leave out enumerate_targets: the targets are then drawn."
            )
        outside = [frame.name for frame in pair.plates if frame.vectorized and frame.name not in keep]
        if outside:
            raise PlateMismatchError(
                f"target {pair.name!r} lies in the plates {listing(outside)}, which do not hold all sites, so that its values there "
                "would have to be enumerated together. Leave out enumerate_targets: the targets are then drawn."
            )
