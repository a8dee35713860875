"""Checks of the options that every loss takes, when it is made."""

from collections.abc import Iterable
from typing import Any

from pyro_kd.losses.targets import Targets

__all__ = ["check_choice", "check_divergence", "checked_targets"]


def check_choice(name: str, value: str, *choices: str) -> None:
    """Raise ValueError where an option has none of its two values."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}")


def check_divergence(name: str, function: Any) -> None:
    """Raise TypeError where a divergence is no function."""
    if not callable(function):
        raise TypeError(f"{name} must be a function d(p, q, value), such as pyro_kd.divergences.kl, not {function!r:.60}")


def checked_targets(targets: Any) -> Targets:
    """Targets as a list, a predicate or None. Raises TypeError for anything else."""
    if targets is None or callable(targets):
        return targets
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, Iterable):
        raise TypeError(f"targets must be site names, a predicate or None, not {names!r}")
    return list(names)
