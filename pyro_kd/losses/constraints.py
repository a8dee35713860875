"""Checks that the parameters of distributions satisfy their constraints, cheap enough for every call.

A Normal with a negative scale has a finite KL, so training would continue. Pyro and torch detect it when validation is on, which
for speed is only the case in some calls (:mod:`pyro_kd.losses.validation`). These checks look only at what is trained, and only
compare: they compute no norm and no Cholesky factor. A NaN is found in the loss.
"""

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import lazy_property

from pyro_kd.errors import InvalidParameterError

__all__ = ["ParameterCheck", "check_parameters", "parameter_checks", "raise_for", "sites_of"]

_SKIPPED: Any = tuple(
    type(constraint)
    for constraint in (
        *(constraints.real, constraints.positive_definite, constraints.positive_semidefinite),
        *(constraints.symmetric, constraints.corr_cholesky),
    )
)


class ParameterCheck(NamedTuple):
    """One parameter of a site's distribution, and whether all its values are allowed (``holds``, a boolean scalar)."""

    site: str
    family: str
    parameter: str
    constraint: str
    holds: Tensor


def sites_of(trace: Trace) -> Iterator[tuple[str, Any]]:
    """Names and distributions of a trace's sample sites."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            yield name, site["fn"]


def parameter_checks(sites: Iterable[tuple[str, Any]]) -> list[ParameterCheck]:
    """The checks of parameters that are trained; of all parameters where gradients are off."""
    return [check for name, fn in sites if isinstance(fn, Distribution) for check in _checks(name, fn)]


def check_parameters(trace: Trace) -> None:
    """Raise InvalidParameterError where a parameter that is trained violates its constraint."""
    checks = parameter_checks(sites_of(trace))
    if checks and not torch.stack([check.holds for check in checks]).all():
        raise_for(checks, [bool(check.holds) for check in checks])


def raise_for(checks: Sequence[ParameterCheck], holds: Sequence[bool]) -> None:
    """Raise InvalidParameterError for the first check that does not hold."""
    for check, is_good in zip(checks, holds, strict=True):
        if not is_good:
            raise InvalidParameterError(
                f"parameter {check.parameter!r} of the {check.family} at site {check.site!r} has values outside its "
                f"constraint ({check.constraint}); no update was made. Constrain it: "
                "pyro.param(..., constraint=...), PyroParam, or softplus or exp of a network's output."
            )


def _checks(site: str, fn: Any) -> Iterator[ParameterCheck]:
    held, needs_grad = vars(fn), torch.is_grad_enabled()
    family: Any = type(fn)
    of_family = _checked_of_family(family)
    given = [name for name in held if name in _lazy_of_family(family)]
    if len(given) > 1:  # one of them follows from the other, such as probs from logits, and is there in some runs only
        given = [name for name in given if held[name] is held.get("_param")] or given[:1]
    for name, constraint in _checked(getattr(fn, "arg_constraints", None) or {}) if of_family is None else of_family:
        value = held.get(name) if name in given or name not in _lazy_of_family(family) else None
        if isinstance(value, Tensor) and (value.requires_grad or not needs_grad):
            value = value.detach()
            good = value >= 0 if isinstance(constraint, type(constraints.simplex)) else constraint.check(value)
            yield ParameterCheck(site, type(fn).__name__, name, str(constraint), good.all() | value.isnan().any())
    for inner in held.values():
        if isinstance(inner, Distribution):
            yield from _checks(site, inner)


@functools.lru_cache(maxsize=256)
def _checked_of_family(family: type) -> Sequence[tuple[str, Any]] | None:
    """The constraints to check for all distributions of a family; None if they depend on the distribution."""
    declared = inspect.getattr_static(family, "arg_constraints", {})
    return _checked(declared) if isinstance(declared, Mapping) else None


@functools.lru_cache(maxsize=256)
def _lazy_of_family(family: type) -> frozenset[str]:
    """The parameters of a family of which one follows from the other, and is computed when it is asked for."""
    declared = inspect.getattr_static(family, "arg_constraints", {})
    names = declared if isinstance(declared, Mapping) else {}
    return frozenset(name for name in names if isinstance(inspect.getattr_static(family, name, None), lazy_property))


def _checked(declared: Mapping[str, Any]) -> Sequence[tuple[str, Any]]:
    return [
        (name, constraint)
        for name, constraint in declared.items()
        if not constraints.is_dependent(constraint) and not isinstance(_base_of(constraint), _SKIPPED)
    ]


def _base_of(constraint: Any) -> Any:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint
