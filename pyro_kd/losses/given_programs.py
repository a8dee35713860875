"""A student and a teacher with given targets, as :mod:`pyro_kd.losses.marginal_run` runs them on all states of their latents.

Taught --targets, inputs, rows of subsampled plates--> both programs --> Enumerated
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.runtime import Message, am_i_wrapped
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_kd.errors import PlateMismatchError, PyroKDError, UnsupportedDivergenceError
from pyro_kd.isolation.effects import without_effect
from pyro_kd.isolation.freezing import is_frozen
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.losses.giving import CollectingReplayMessenger, GiveMessenger
from pyro_kd.losses.ownership import check_no_shared_leaves, leaves_of_densities
from pyro_kd.losses.program_pair import Program, ProgramPair
from pyro_kd.losses.recording import Taught
from pyro_kd.noise.samplers import draws_nothing, unwrapped
from pyro_kd.sites.classification import observed_inputs
from pyro_kd.sites.compatibility import check_comparable
from pyro_kd.sites.enumeration import Enumerated, enumerated, sample_sites
from pyro_kd.sites.pairing import SitePair, names_in_student, pair_sites
from pyro_kd.sites.plates import differing_plates, sizes_of
from pyro_kd.sites.states import event_states, num_states
from pyro_kd.sites.survey import survey
from pyro_kd.sites.tracing import get_trace
from pyro_kd.sites.unpaired import unpaired_error
from pyro_kd.utils.randomness import keeping_random_state

__all__ = ["GivenPrograms"]

_MOST_SURVEYS = 32


@dataclass
class GivenPrograms:
    """The two programs of one call, and how each is run on given targets."""

    student: Program
    teacher: Program
    args: Any
    kwargs: Any
    taught: Taught
    names: list[str]
    site_map: dict[str, str]
    known: ProgramPair
    max_states: int
    has_teacher: bool

    def __post_init__(self) -> None:
        self.to_student = names_in_student(self.site_map)
        self.twins = [self.to_student.get(name, name) for name in self.names]

    def surveyed(self, enumerate_targets: bool) -> tuple[int, dict[str, Tensor]]:
        """The number of dimensions of plates, and the states of the targets that are to be enumerated.

        What runs of the programs on given targets would need is found out once for each set of sites and shapes.
        """
        shapes = tuple(
            (name, tuple(getattr(site["fn"], "batch_shape", ())), tuple(getattr(site["fn"], "event_shape", ())))
            for name, site in sample_sites(self.taught.trace).items()
        )
        counts = {name: _num_values(self.taught.sites[name]["fn"], name) for name in self.names if enumerate_targets}
        key = (shapes, self.max_states, tuple(counts.items()))
        if key not in self.known.nestings:
            if len(self.known.nestings) >= _MOST_SURVEYS:
                self.known.nestings.clear()
            with without_effect(self.known.student, self.known.teacher):
                self.known.nestings[key] = self._survey(prod(counts.values()))
        nesting, states = self.known.nestings[key], dict[str, Tensor]()
        for index, name in enumerate(reversed(counts)):
            values = event_states(self.taught.sites[name]["fn"], name)
            states[name] = values.reshape(len(values), *(1,) * (nesting + index), *values.shape[1:])
        return nesting, states

    def _survey(self, given_states: int) -> int:
        """Run each program once as it is. Returns the number of dimensions that plates take."""
        limits: dict[str, Any] = {"max_states": self.max_states, "given_states": given_states}
        own, give = self._held_student({})
        with self._naming_plates(give):
            try:
                student = survey(own, self.args, self.kwargs, counted=self.twins, **limits)
            except UnsupportedDivergenceError:
                with torch.no_grad(), keeping_random_state():
                    self.pairs(get_trace(own, self.args, self.kwargs))  # a target under a different name looks like a latent
                raise
        for pair in self.pairs(student.trace):
            check_comparable(pair, needs_support=True, is_vectorized=False)
        nesting = student.nesting
        if self.has_teacher:
            with self._as_teacher():
                theirs = survey(self._held_teacher({}), self.args, self.kwargs, counted=self.names, **limits)
            nesting = max(nesting, theirs.nesting)
            theirs.check(lambda: self.teacher_run(nesting, {}))
        with torch.no_grad():
            student.check(lambda: self.student_run(nesting, {})[0])
        if not is_frozen(self.known.teacher) and torch.is_grad_enabled():
            self._check_leaves()
        return nesting

    def _check_leaves(self) -> None:
        """Raise SharedParameterError where the densities of both programs depend on one tensor."""
        own, _ = self._held_student({})
        with evaluation_mode(self.teacher), torch.enable_grad():
            theirs = leaves_of_densities(poutine.trace(self._held_teacher({})).get_trace(*self.args, **self.kwargs))
            mine = poutine.trace(own).get_trace(*self.args, **self.kwargs)
        check_no_shared_leaves(mine, theirs, self.known.student, self.known.teacher)

    def teacher_run(self, nesting: int, states: Mapping[str, Tensor]) -> Enumerated:
        """The teacher on all states of its latents, without gradients."""
        with self._as_teacher():
            return enumerated(
                self._held_teacher(states), self.args, self.kwargs, counted=self.names, **self._limits(nesting, states)
            )

    def student_run(self, nesting: int, states: Mapping[str, Tensor]) -> tuple[Enumerated, GiveMessenger]:
        """The student on all states of its latents, and the handler that has given it its targets."""
        held, give = self._held_student(states)
        with self._naming_plates(give):
            return enumerated(held, self.args, self.kwargs, counted=self.twins, **self._limits(nesting, states)), give

    @contextmanager
    def _naming_plates(self, give: GiveMessenger) -> Iterator[None]:
        """Where the student's run fails and its plates have other sizes than the teacher's, say so."""
        try:
            yield
        except (ValueError, RuntimeError, IndexError) as error:
            differ = differing_plates(student=give.sizes, teacher=sizes_of(self.taught.trace))
            if differ and (not isinstance(error, PyroKDError) or isinstance(error, UnsupportedDivergenceError)):
                raise PlateMismatchError(
                    f"{differ}, as at site {give.last!r}. Give it the same size in both programs."
                ) from error
            raise

    def _limits(self, nesting: int, states: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"nesting": nesting, "given": len(states), "max_states": self.max_states, "may_scale": True}

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        """Run a teacher as a loss does: without gradients, in eval mode, and with its parameters out of SVI's sight."""
        with (
            torch.no_grad(),
            nullcontext() if is_frozen(self.teacher) else evaluation_mode(self.teacher),
            poutine.block(hide_types=["param"]) if am_i_wrapped() else nullcontext(),
        ):
            yield

    def _held_teacher(self, states: Mapping[str, Tensor]) -> Program:
        sites = {name: self._given(name, states) for name in self.names}
        return self._giving(self.teacher, sites, {}, {})[0]

    def _held_student(self, states: Mapping[str, Tensor]) -> tuple[Program, "_GiveAllMessenger"]:
        sites = {self.to_student.get(name, name): self._given(name, states) for name in self.names}
        inputs = {self.to_student.get(name, name): value for name, value in observed_inputs(self.taught.trace).items()}
        return self._giving(self.student, sites, inputs, self.to_student)

    def _giving(
        self, program: Program, sites: Mapping[str, Any], inputs: Mapping[str, Any], names: Mapping[str, str]
    ) -> tuple[Program, "_GiveAllMessenger"]:
        """A program that is given the targets, the inputs, and the rows of subsampled plates."""
        rows: dict[str, Any] = {
            names.get(name, name): site["value"]
            for name, site in self.taught.trace.nodes.items()
            if site["type"] == "sample" and site_is_subsample(site) and not draws_nothing(site["fn"])
        }
        give = _GiveAllMessenger(sites, dict.fromkeys(sites, True), inputs, CollectingReplayMessenger({}, {}, ()))
        give.rows, give.targets = rows, self.names

        def held(*args: Any, **kwargs: Any) -> Any:
            with give:
                return program(*args, **kwargs)

        return held, give

    def _given(self, name: str, states: Mapping[str, Tensor]) -> Any:
        site = self.taught.sites[name]
        return {**site, "value": states[name]} if name in states else site

    def pairs(self, student: Any) -> list[SitePair]:
        """The pairs of targets. Raises UnpairedSiteError where the student lacks one."""
        own = sample_sites(student)
        pairs, alone = pair_sites(
            student={name: own[name] for name in self.twins if name in own},
            teacher={name: self.taught.sites[name] for name in self.names},
            targets=self.names,
            to_student=self.to_student,
            fresh=(),
        )
        if alone:
            raise unpaired_error([alone], targets=self.names, site_map=self.site_map, fresh=(), plates="")
        return pairs


class _GiveAllMessenger(GiveMessenger):
    """Give a program the values of its targets in all elements, and the rows of its subsampled plates.

    An element that a mask hides has no term, and counts as an input.
    """

    rows: Mapping[str, Tensor]

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        if site_is_subsample(msg):
            if msg["value"] is None and msg["name"] in self.rows:
                msg["value"] = self.rows[str(msg["name"])]
            return
        super()._pyro_sample(msg)

    def _value(self, name: str, msg: Any) -> Tensor:
        return self._given(name, msg["fn"])


def _num_values(fn: Any, name: str) -> int:
    try:
        return num_states(fn, name)
    except UnsupportedDivergenceError:
        raise UnsupportedDivergenceError(
            f"target {name!r} is {type(unwrapped(fn)).__name__}, whose values cannot be enumerated. Leave out enumerate_targets: the "
            "targets are then drawn."
        ) from None
