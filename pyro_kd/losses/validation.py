"""Which calls of a loss Pyro and torch validate: a twentieth of a small model's step is spent on it.

In the other calls there is one look for all sites: whether the parameters of the student's distributions are within their
constraints. A negative scale may well give a finite loss.
"""

import functools
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro.poutine import Trace
from pyro.poutine.util import is_validation_enabled
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_kd.errors import InvalidParametersError

__all__ = ["Argument", "Validation", "arguments_of", "check_arguments", "unvalidated_sites"]

_EVERY = 50
_MAX_KINDS = 64
_HARMLESS = (type(constraints.real), type(constraints.positive_definite), type(constraints.lower_triangular))


class Validation:
    """Counts the calls of the pair of programs that ran last, for each kind of arguments."""

    def __init__(self) -> None:
        self._pair: tuple[Any, Any] | None = None
        self._calls: dict[Any, int] = {}

    @contextmanager
    def of_call(self, student: Any, teacher: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[bool]:
        """Leave validation as it is in the first call of a kind and in every 50th after it, and turn it off in the others.

        Of a loss with several particles, each counts as a call.

        Yields:
            Whether it was turned off.
        """
        kind = _kind_of(args, kwargs)
        if self._pair != (student, teacher) or len(self._calls) > _MAX_KINDS:
            self._pair, self._calls = (student, teacher), {}
        count = self._calls.get(kind, 0)
        if not is_validation_enabled() or kind is None or count % _EVERY == 0:
            yield False
        else:
            flag = Distribution._validate_args  # which Pyro's context manager would set to its own
            try:
                with pyro.validation_enabled(False):
                    yield True
            finally:
                Distribution.set_default_validate_args(flag)
        self._calls[kind] = count + 1


class Argument(NamedTuple):
    """A parameter of a distribution that a constraint restricts."""

    site: str
    name: str
    value: Tensor
    constraint: constraints.Constraint


def check_arguments(trace: Trace, exempt: Collection[str] = ()) -> None:
    """Raise InvalidParametersError, naming the site, where a parameter of a distribution is outside of its constraint.

    Args:
        trace: of the student.
        exempt: sites that are not looked at.
    """
    arguments = [argument for argument in arguments_of(trace) if argument.site not in exempt]
    if not arguments or torch.stack([argument.constraint.check(argument.value).all() for argument in arguments]).all():
        return
    bad = next(argument for argument in arguments if not argument.constraint.check(argument.value).all())
    raise InvalidParametersError(
        f"site {bad.site!r} of the student has a {bad.name} outside of its constraint {bad.constraint}; the smallest entry is "
        f"{bad.value.min().item():.4g}, the largest {bad.value.max().item():.4g}. Give the parameter a constraint, "
        "pyro.param(..., constraint=constraints.positive), or use softplus or exp in the program; or lower the learning rate."
    )


def unvalidated_sites(trace: Trace) -> set[str]:
    """The sites whose distributions are not to be validated (``validate_args=False``), in a run with validation."""
    return {
        str(name)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and any(vars(fn).get("_validate_args") is False for fn in _parts(site["fn"]))
    }


def arguments_of(trace: Trace) -> Iterator[Argument]:
    """The parameters of the distributions at a trace's sites that can be outside of a constraint without making a NaN."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            for fn in _parts(site["fn"]):
                for parameter, constraint in _restricted(fn):
                    value = vars(fn).get(parameter)  # lazily computed ones follow from the others
                    if isinstance(value, Tensor):
                        yield Argument(str(name), parameter, value.detach(), constraint)


def _parts(fn: Any) -> Iterator[Distribution]:
    """A distribution, and those that it is made of: independent copies, mixtures, transforms of them."""
    if isinstance(fn, Distribution):
        yield fn
        for part in vars(fn).values():
            yield from _parts(part)


def _restricted(fn: Distribution) -> Iterable[tuple[str, constraints.Constraint]]:
    declared = getattr(type(fn), "arg_constraints", None)
    if isinstance(declared, dict):
        family: Any = type(fn)
        return _of_family(family)
    try:
        return _those_that_restrict(fn.arg_constraints)  # a property, of families whose parameters restrict each other
    except NotImplementedError:  # a user's own, that declares none
        return ()


@functools.cache
def _of_family(family: type[Distribution]) -> list[tuple[str, constraints.Constraint]]:
    declared: Any = family.arg_constraints
    return _those_that_restrict(declared)


def _those_that_restrict(declared: dict[str, constraints.Constraint]) -> list[tuple[str, constraints.Constraint]]:
    """Without those that only a NaN breaks, and those that a distribution's own constructor cannot do without."""
    return [
        (name, constraint)
        for name, constraint in declared.items()
        if not constraints.is_dependent(constraint)
        and not constraint.is_discrete
        and not isinstance(getattr(constraint, "base_constraint", constraint), _HARMLESS)
    ]


def _kind_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Shapes of tensors and values of numbers and names, with the grad mode; None where there are other arguments."""
    kind: list[Any] = [tuple(kwargs), torch.is_grad_enabled()]
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            kind.append((value.shape, value.dtype))
        elif isinstance(value, int | str) or value is None:
            kind.append((type(value), value))
        else:
            return None
    return tuple(kind)
