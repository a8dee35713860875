"""A distillation loss as a compiled graph: what a loss adds to :mod:`pyro_kd.capture`, which knows no losses."""

import math
import os
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_kd.capture import Capture, DeferredReads, Outputs, Run
from pyro_kd.capture.code_names import is_installed, names_in
from pyro_kd.capture.static_state import StaticState
from pyro_kd.isolation.freezing import frozen_tensors
from pyro_kd.losses.constraints import ParameterCheck, parameter_checks, raise_for, sites_of
from pyro_kd.losses.finite import check_finite_loss
from pyro_kd.losses.forcing import chance_option
from pyro_kd.losses.shares import Share
from pyro_kd.losses.targets import Weight, probability_of
from pyro_kd.losses.terms import SiteTerm
from pyro_kd.sites.tracing import params_of
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.pyro_internals import unconstrained_params

__all__ = ["CapturedLoss"]


class _Notes(NamedTuple):
    """What a graph's outputs belong to: the terms of each particle, the checks of parameters, and names in Pyro's store."""

    terms: list[list[SiteTerm]]
    checks: list[ParameterCheck]
    params: list[str]


_OF_NO_EFFECT = ("_pairs", "compile_options")
"""Attributes of a loss that its graphs do not depend on."""


_WEIGHTS = ("latent_weight", "given_weight")
_CHANCES = ("teacher_forcing", "student_fraction")
_BY_SITE = (*_WEIGHTS, *_CHANCES, "local_first")
"""The options of a loss that are numbers by site. The numbers are inputs of a graph."""

_BY_NAME = ("getattr", "attrgetter", "vars", "__dict__", "__getattribute__")
"""What gets attributes by names that need not be in the code."""

_LIBRARIES = ("pyro_kd", "pyro", "torch", "abc", "builtins", "typing")
_FOLDERS = tuple(f"{folder}{os.sep}" for folder in (*pyro.__path__, *torch.__path__, Path(__file__).parents[1]))


class _Option(NamedTuple):
    """The static part of such an option.

    Attributes:
        names: the sites that have their own number; empty where one number holds for all.
        fixed: for each number, its value if that is a constant of the graph, else None. A latent of weight 0 has no term, and no
            coins are tossed for a probability of 0 or 1, unless there is a schedule.
        function: the option as a function of the site name; its values are constants of a graph. None if it is not a function.
        start: where the numbers of this option begin among those of all options.
    """

    names: tuple[str, ...]
    fixed: tuple[float | None, ...]
    function: Callable[[str], float] | None
    start: int

    @property
    def is_needed(self) -> bool:
        """Whether some number may differ from 0."""
        return self.function is not None or any(number != 0 for number in self.fixed)

    def number(self, site: str, numbers: Any) -> Any:
        """The number at a site, or its part of ``numbers``. None where the option is a function or lacks the site."""
        if not self.fixed or (self.names and site not in self.names):
            return None
        index = self.names.index(site) if self.names else 0
        fixed = self.fixed[index]
        return numbers[self.start + index] if fixed is None else fixed


_Static = tuple[tuple[str, Any], ...]


class CapturedLoss:
    """A loss between a student and a teacher, or one particle of it, captured.

    Args:
        evaluate: ``f(args, kwargs, weigh=...)`` runs both programs with every check, and returns the particles and the loss. It calls
            ``weigh`` on each term, which replaces the weights of latent terms by inputs of the graph.
        eager: ``f(args, kwargs)`` returns the share of the loss where there is no graph.
        programs: student and teacher.
        loss: the loss, whose options are part of the key.
        options: those of :meth:`DistillationLoss.compile <pyro_kd.losses.base.DistillationLoss.compile>`.
    """

    def __init__(
        self,
        evaluate: Callable[..., tuple[Sequence[Any], Tensor]],
        eager: Callable[[Any, Any], Share],
        programs: tuple[Any, Any],
        loss: Any,
        options: Mapping[str, Any],
    ) -> None:
        self._evaluate = evaluate
        self._eager = eager
        roots = {"student": programs[0], "teacher": programs[1], "loss": loss}
        self._loss = loss
        told_in_each_call = () if _reads_options(loss) else _BY_SITE
        ignored = [f"loss.{name}" for name in (*_OF_NO_EFFECT, *told_in_each_call)]
        self._capture = Capture(
            self._run,
            self._run_eagerly,
            roots,
            type(loss).__name__,
            partial(frozen_tensors, programs[1]),
            ignored,
            **options,
        )
        self._numbers: tuple[tuple[float, ...], Tensor] = (), torch.zeros(0)
        self._deferred = DeferredReads()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Share:
        """The share of the loss for these arguments, from a graph if possible.

        On a GPU no call waits for its checks. An error is then about an earlier call, and is raised as soon as that call's result is
        known; until then the gradient of such a loss is 0.

        Args:
            args, kwargs: arguments of both programs.

        Raises:
            InvalidParameterError: a parameter of the student's distributions violates its constraint.
            NonFiniteLossError: the loss is NaN or infinite.
        """
        self._deferred.collect()
        static, numbers = self._split()
        if not all(number >= 0 for number in numbers) or any(
            number > 1 for number in numbers[static["teacher_forcing"].start :]
        ):
            return self._eager(args, kwargs)  # which names the site
        outputs = self._capture(
            (self._as_tensor(numbers),), args, kwargs, (*static.items(), ("is_open", self._loss.teacher_forcing is None))
        )
        if not outputs.is_from_graph:
            share: Share = outputs.notes
            return share
        if outputs.loss.device.type == "cpu":
            _check(outputs)
        else:
            held = outputs._replace(loss=outputs.loss.detach())
            self._deferred.add(held.loss, lambda loss: self._check_deferred(held, math.isfinite(loss)))
            if outputs.notes.checks:
                self._deferred.add(held.details[-1], lambda holds: self._check_deferred(held, holds))
        terms = partial(_weighted_terms, outputs, static, numbers)
        return Share(outputs.loss, partial(_stored, outputs.notes.params), terms)

    def _split(self) -> tuple[dict[str, _Option], tuple[float, ...]]:
        """The static part of the options, and their numbers."""
        options, numbers = dict[str, _Option](), tuple[float, ...]()
        for name in (*_WEIGHTS, *_CHANCES):
            constants = (0.0,) if name in _WEIGHTS else () if name in self._loss.scheduled else (0.0, 1.0)
            value = chance_option(self._loss, name) if name in _CHANCES else getattr(self._loss, name)
            options[name], found = _split(value, len(numbers), constants)
            numbers += found
        return options, numbers

    def _run(self, tensors: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any], static: _Static) -> Run:
        """The function that is traced."""
        (numbers,) = tensors
        options = dict(static)

        def weigh(term: SiteTerm) -> SiteTerm:
            if term.kind == "target":
                return term
            weight = options[f"{term.kind}_weight"].number(term.site, numbers)
            return term._replace(weight=weight.to(term.value)) if isinstance(weight, Tensor) else term

        def chance_of(site: str, *, option: str) -> float | Tensor:
            chance = options[option].number(site, numbers)
            return probability_of(site, chance_option(self._loss, option), option=option) if chance is None else chance

        chances = {option: partial(chance_of, option=option) for option in _CHANCES if options[option].is_needed}
        particles, loss = self._evaluate(args, kwargs, weigh=weigh, chances=chances)
        students = [particle.run.student for particle in particles]
        terms = [particle.terms for particle in particles]
        checks = [check for student in students for check in parameter_checks(sites_of(student))]
        params = list(dict.fromkeys(name for student in students for name in params_of(student)))
        leaves = leaves_of([loss]) if torch.is_grad_enabled() else ()
        details = [torch.stack([term.value.detach() for term in chain(*terms)])]
        if checks:
            holds = torch.stack([check.holds.to(loss.device) for check in checks])
            details += [holds, holds.all()]
        terms = [[term._replace(value=loss.detach()) for term in each] for each in terms]
        checks = [check._replace(holds=loss.detach()) for check in checks]
        return Run(loss, details, leaves, params, _Notes(terms, checks, params))

    def _run_eagerly(
        self, tensors: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any], static: _Static
    ) -> Run:
        share = self._eager(args, kwargs)
        return Run(share.loss, notes=share)

    def _as_tensor(self, numbers: tuple[float, ...]) -> Tensor:
        if self._numbers[0] != numbers:
            self._numbers = numbers, torch.tensor(numbers, dtype=torch.float64)
        return self._numbers[1]

    def _check_deferred(self, outputs: Outputs, is_good: bool) -> None:
        if not is_good and outputs.is_valid:
            self._deferred.clear()
            _check(outputs)


def _reads_options(loss: Any) -> bool:
    """Whether a user's loss may read such an option itself, and not from terms: then they are constants of a graph.

    The code is that of the loss's class and of all functions that it reaches. Code that gets attributes by name may get any.
    """
    own = [base for base in type(loss).__mro__ if base.__module__.partition(".")[0] not in _LIBRARIES]
    if any(is_installed(base.__module__) for base in own):
        return True  # what it calls is not followed
    roots = {"loss": loss, **{f"class {number}": vars(base) for number, base in enumerate(own)}}
    tokens = StaticState(roots, [f"loss.{name}" for name in _OF_NO_EFFECT]).tokens.values()
    codes = [token[1] for token in tokens if token[0] is types.FunctionType]
    names = frozenset[str]().union(*(names_in(code) for code in codes if not code.co_filename.startswith(_FOLDERS)))
    return not names.isdisjoint((*_BY_SITE, *_BY_NAME))


def _split(option: Weight | None, start: int, constants: Collection[float]) -> tuple[_Option, tuple[float, ...]]:
    """The static part of an option, and its numbers. Those among ``constants`` are constants of the graph."""
    if option is None or callable(option):
        return _Option((), (), option, start), ()
    names: tuple[str, ...] = ()
    values: list[Any] = [option]
    if isinstance(option, Mapping):
        names, values = tuple(option), list(option.values())
    numbers = tuple(math.nan if isinstance(value, str) else float(value) for value in values)
    fixed = tuple(number if number in constants else None for number in numbers)
    return _Option(names, fixed, None, start), numbers


def _stored(names: Sequence[str]) -> dict[str, Tensor]:
    """The unconstrained parameters in Pyro's store with these names."""
    store = unconstrained_params(pyro.get_param_store())
    return {name: store[name] for name in names}


def _check(outputs: Outputs) -> None:
    if outputs.notes.checks and not outputs.details[-1].item():
        raise_for(outputs.notes.checks, outputs.details[1].tolist())
    check_finite_loss(outputs.loss, _terms(outputs))


def _terms(outputs: Outputs) -> Iterator[SiteTerm]:
    """The terms of a call, whose values are read only if they are asked for."""
    for term, value in zip(chain(*outputs.notes.terms), outputs.details[0].unbind(), strict=True):
        yield term._replace(value=value)


def _weighted_terms(outputs: Outputs, options: Mapping[str, _Option], numbers: tuple[float, ...]) -> list[list[SiteTerm]]:
    """The terms of each particle of a call with the weights of the call; none where a guard of the graph did not hold."""
    if not outputs.is_valid:
        return []
    terms = _terms(outputs)
    return [[_weighted(term, options, numbers) for term in islice(terms, len(each))] for each in outputs.notes.terms]


def _weighted(term: SiteTerm, options: Mapping[str, _Option], numbers: tuple[float, ...]) -> SiteTerm:
    weight = None if term.kind == "target" else options[f"{term.kind}_weight"].number(term.site, numbers)
    return term if weight is None else term._replace(weight=weight)
