"""The draws of an ArviZ pair as columns of numbers, one per scalar variable, for plots.

Reads the objects made by :mod:`pyro_kd.diagnosis.inference_data`, with ArviZ 0.x and 1.x. Knows arrays, but no figures.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from pyro_kd.diagnosis.inference_data import InferencePair
from pyro_kd.errors import UnknownTargetError, listing, nearest

__all__ = ["Columns", "density_curve", "joint_columns", "single_columns", "thin"]

Columns = dict[str, tuple[np.ndarray, np.ndarray]]
"""Variable, such as ``z`` or ``x[0]`` -> its draws in the teacher and in the student, each of shape (draws,)."""

MAX_ENTRIES = 6
"""At most this number of entries of one event become variables."""
MAX_POINTS = 4000
"""A density curve is estimated from at most this number of draws."""


def single_columns(pair: InferencePair, sites: Sequence[str] | None) -> Columns:
    """Every variable of the sites (None: of the sites that both programs have), with the draws of all rows pooled."""
    teacher, student = _variables(pair.teacher), _variables(pair.student)
    if sites is None:
        sites = [name for name in teacher if name in student]
    if not sites:
        raise ValueError("there is no site to draw: both programs must draw it, and sites=None takes all of those")
    columns: Columns = {}
    for site in sites:
        mine, yours = _entries(_get(teacher, site), site), _entries(_get(student, site), site)
        columns |= {label: (_flat(mine[label], label), _flat(yours[label], label)) for label in mine if label in yours}
    return columns


def joint_columns(pair: InferencePair, sites: Sequence[str]) -> Columns:
    """Variables whose draws belong together entry by entry: dimensions with the same name are matched."""
    import xarray

    if not sites:
        raise ValueError("sites is empty: pass the names of at least two variables")
    programs = []
    for data in (pair.teacher, pair.student):
        variables = _variables(data)
        entries = {label: entry for site in sites for label, entry in _entries(_get(variables, site), site).items()}
        matched = xarray.broadcast(*entries.values())
        table = np.stack([entry.values.reshape(-1).astype(float) for entry in matched])
        table = table[:, ~np.isnan(table).any(0)]
        for label, column in zip(entries, table, strict=True):
            _require_finite(column, label)
        programs.append(dict(zip(entries, table, strict=True)))
    mine, yours = programs
    return {label: (mine[label], yours[label]) for label in mine if label in yours}


def first_draw(pair: InferencePair, site: str) -> tuple[np.ndarray, np.ndarray]:
    """The first draw of a site by teacher and student, each of shape (*plates, *event_shape)."""
    teacher, student = (np.asarray(_get(_variables(data), site).values)[0, 0] for data in (pair.teacher, pair.student))
    return teacher, student


def thin(size: int, most: int) -> np.ndarray:
    """Indices of at most ``most`` of ``size`` draws, at random: evenly spaced ones would be of some rows of a plate alone."""
    if size <= most:
        return np.arange(size)
    return np.sort(np.random.default_rng(0).choice(size, most, replace=False))


def density_curve(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel estimate of a density, with Silverman's bandwidth.

    Args:
        values: the sample, shape (n,), which must not be constant.
        grid: the points at which to evaluate the density, shape (m,).

    Returns:
        The density at the points, shape (m,).
    """
    values = values[thin(len(values), MAX_POINTS)]
    spread = values.std()
    middle = np.subtract(*np.quantile(values, [0.75, 0.25])) / 1.34
    width = 0.9 * (min(spread, middle) if middle > 0 else spread) * len(values) ** -0.2
    density: np.ndarray = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2).mean(1) / (width * np.sqrt(2 * np.pi))
    return density


def _variables(data: Any) -> dict[str, Any]:
    """The draws of a program by site, latents first."""
    groups = [group for group in ("prior", "prior_predictive") if group in data]
    return {str(name): array for group in groups for name, array in data[group].data_vars.items()}


def _get(variables: dict[str, Any], site: str) -> Any:
    if site not in variables:
        raise UnknownTargetError(
            f"site {site!r} does not have draws in both programs; one of them has {listing(variables)}.{nearest(site, variables)}"
        )
    return variables[site]


def _entries(array: Any, site: str) -> dict[str, Any]:
    """The scalar variables of a site: a single one, or one per entry of its event."""
    dims = [dim for dim in array.dims if str(dim).startswith(f"{site}_dim_")]
    if not dims:
        return {site: array}
    entries = islice(np.ndindex(*(array.sizes[dim] for dim in dims)), MAX_ENTRIES)
    return {
        f"{site}[{','.join(map(str, entry))}]": array.isel(dict(zip(dims, entry, strict=True)), drop=True)
        for entry in entries
    }


def _flat(array: Any, label: str) -> np.ndarray:
    """All draws, without those that lack the variable, which are NaN."""
    values: np.ndarray = array.values.reshape(-1).astype(float)
    values = values[~np.isnan(values)]
    _require_finite(values, label)
    return values


def _require_finite(values: np.ndarray, label: str) -> None:
    """Raise ValueError where a variable has infinite draws, or none that is a number."""
    infinite = int(np.isinf(values).sum())
    if infinite or not len(values):
        what = f"{infinite} infinite draws of {len(values)}" if infinite else "no draw that is a number"
        raise ValueError(f"{label!r} has {what}, of which no law can be drawn. Look for the cause, or leave out the site.")
