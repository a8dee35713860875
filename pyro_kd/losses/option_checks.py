"""Checks of the options that every loss takes, when it is made."""

from collections.abc import Iterable, Mapping
from typing import Any

from pyro_kd.losses.targets import Targets

__all__ = ["check_choice", "check_divergence", "checked_fresh", "checked_site_map", "checked_targets"]


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


def checked_site_map(site_map: Any) -> dict[str, str]:
    """A site map as a dictionary. Raises TypeError for anything but a mapping."""
    if site_map is not None and not isinstance(site_map, Mapping):
        raise TypeError(
            f"site_map must be a mapping from the student's names to the teacher's, {{'z': 'z1'}}, not {site_map!r:.60}"
        )
    return dict(site_map or {})


def checked_fresh(fresh: Any) -> frozenset[str]:
    """Names of fresh sites as a set. Raises TypeError for anything but names."""
    names = [fresh] if isinstance(fresh, str) else fresh
    if not isinstance(names, Iterable):
        raise TypeError(f"fresh must be names of sites, such as ['z'], not {fresh!r:.60}")
    return frozenset(names)
