"""ArviZ objects of teacher and student, for tables and plots of their draws.

    paired draws --> one array per site, named dimensions --> the adapter --> InferencePair(student, teacher)

Sites become variables, and plates become named dimensions. The adapter (:mod:`pyro_kd.diagnosis.arviz_adapter`) knows ArviZ's
versions.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample

from pyro_kd.diagnosis.arviz_adapter import import_arviz, to_arviz
from pyro_kd.diagnosis.paired_draws import paired_draws
from pyro_kd.errors import PlateMismatchError, listing, nearest
from pyro_kd.losses.base import DistillationLoss
from pyro_kd.noise.statements import is_bookkeeping
from pyro_kd.sites.plates import row_numbers
from pyro_kd.utils.randomness import keeping_random_state, set_seed
from pyro_kd.utils.tables import format_table, html_table

__all__ = ["InferencePair", "to_inference_data"]

_GROUPS = ("prior", "prior_predictive", "observed_data", "sample_stats")
_HEADER = ["variable", "group", "program", "dimensions", "shape"]


class InferencePair(NamedTuple):
    """ArviZ objects of the two programs. Each draw of the student is on the noise of the same draw of the teacher.

    Attributes:
        student: ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) with the groups ``prior``, ``prior_predictive``, ``sample_stats``
            (the terms of the loss) and, if the call observes data, ``observed_data``. Sites and plates have the teacher's names.
        teacher: the same groups, without ``sample_stats``.
    """

    student: Any
    teacher: Any

    def _rows(self) -> list[list[str]]:
        return [
            [variable, group, program, " ".join(map(str, array.dims)), " ".join(map(str, array.shape))]
            for program, data in zip(self._fields, self, strict=True)
            for group in _GROUPS
            if group in data
            for variable, array in data[group].data_vars.items()
        ]

    def __repr__(self) -> str:
        return format_table(_HEADER, self._rows())

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows())


@keeping_random_state()
def to_inference_data(
    loss: DistillationLoss,
    student: Callable[..., Any],
    teacher: Callable[..., Any],
    *args: Any,
    num_samples: int = 200,
    coords: Mapping[str, Any] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> InferencePair:
    """Draw from both programs on shared noise, and convert the draws to ArviZ objects.

    There is one chain of ``num_samples`` draws. The groups are:

    - ``prior``: the latents;
    - ``prior_predictive``: the targets;
    - ``observed_data``: the values at sites that the teacher observes in the call;
    - ``sample_stats``, of the student only: the terms of the loss at each draw, before their weights.

    The dimension of a plate has the plate's name. Its coordinates are the plate's indices; it has none where ``subsample`` holds data
    instead of row numbers. The dimensions of an event, and batch dimensions without a plate, are ``<site>_dim_0``, ``<site>_dim_1``,
    and so on. A plate that subsamples keeps its rows over all draws.

    The student draws its own targets, on the noise of the teacher's targets. Where this noise cannot be shared (a family whose noise
    has a different distribution, a different path), the student draws them anew. For the terms, the student is given the values that
    the loss gives it. Both programs run in eval mode. If a draw lacks a site, its value there is NaN. A target whose family in the
    student has no sampler is left out of the student's draws, with a warning.

    Args:
        loss: the loss, which defines targets, pairs of sites and terms.
        student, teacher: the programs.
        args, kwargs: arguments of both programs.
        num_samples: number of draws; each is a run of both programs.
        coords: labels along dimensions, which replace the indices.
            A site or a plate with a name that ArviZ takes itself, ``draw`` or ``chain``, is called ``draw_site`` or ``draw_plate``.
        seed: of the noise; None takes it from where the random streams stand. These are left as they were, so that two reports
            have the same noise unless they have different seeds.

    Returns:
        The two ArviZ objects. Draws of a site have shape ``(1, num_samples, *plates, *event_shape)``.

    Raises:
        ModuleNotFoundError: ArviZ is not installed.
        PlateMismatchError: a site has different shapes in different draws.
        PyroKDError: as for the loss.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd import SurrogateKD
        >>> from pyro_kd.diagnosis.inference_data import to_inference_data
        >>> def program(loc):
        ...     def model():
        ...         with pyro.plate("rows", 3):
        ...             z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...             pyro.sample("x", dist.Normal(z, 1.0))
        ...     return model
        >>> pyro.set_rng_seed(0)
        >>> pair = to_inference_data(SurrogateKD(["x"]), program(2.0), program(0.0), num_samples=50)
        >>> pair.teacher["prior"]["z"].dims
        ('chain', 'draw', 'rows')
        >>> round(float((pair.student["prior"]["z"] - pair.teacher["prior"]["z"]).mean()), 4)
        2.0
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    set_seed(seed)
    import_arviz()
    ours, yours, terms = _Variables(num_samples), _Variables(num_samples), _Variables(num_samples)
    observed, labels, targets, undrawn = _Variables(1), dict[str, Any](), set[str](), dict[str, None]()
    for draw, paired in enumerate(paired_draws(loss, student, teacher, args, kwargs, num_samples)):
        targets.update(map(_free, paired.targets))
        labels |= yours.add_trace(draw, paired.teacher, {})
        labels |= ours.add_trace(draw, paired.student, loss.site_map, paired.undrawn)
        undrawn |= dict.fromkeys(paired.undrawn)
        for term in paired.terms:
            terms.add(draw, _free(term.name), np.asarray(float(term.value)), [])
        if draw == 0:
            for name, value in paired.data.items():
                site = {**paired.teacher.nodes[name], "value": value}
                observed.add(0, _free(name), *_named(_free(name), site, {}))
    if undrawn:
        warnings.warn(
            f"the student cannot draw {listing(undrawn)}: the family there has no sampler. The student's draws lack these sites, and "
            "sites that depend on them are drawn with the teacher's values. To add a sampler, use @pyro_kd.register_sampler.",
            stacklevel=2,
        )
    data = {name: array[0, 0] for name, array in observed.stacked().items()}
    labels |= _coords(coords or {}, [dims for part in (ours, yours, observed) for dims in part.dims.values()])

    def converted(program: _Variables, **further: Any) -> Any:
        groups = {**program.groups(targets), "observed_data": data, **further}
        return to_arviz(groups, _dims(program, observed, terms), labels)

    return InferencePair(student=converted(ours, sample_stats=terms.stacked()), teacher=converted(yours))


@dataclass
class _Variables:
    """The draws of named variables, with the names of their dimensions."""

    num_samples: int
    draws: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    dims: dict[str, list[str]] = field(default_factory=dict)

    def add(self, draw: int, name: str, value: np.ndarray, dims: list[str]) -> None:
        column = self.draws.setdefault(name, {})
        first = next(iter(column.values()), value)
        if value.shape != first.shape:
            raise PlateMismatchError(
                f"site {name!r} has shape {first.shape} in one draw and {value.shape} in a later one, so draws cannot be stacked. "
                "If the number of rows is drawn at random, pass it to the programs as an argument instead."
            )
        column[draw] = value
        self.dims[name] = dims

    def add_trace(
        self, draw: int, trace: Trace, site_map: Mapping[str, str], undrawn: Collection[str] = ()
    ) -> dict[str, Any]:
        """Add what a program draws. Returns the indices of its plates."""
        indices = {}
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site_is_subsample(site):
                rows = row_numbers(site)
                if rows is not None:
                    indices[_plate(name, site_map)] = rows.numpy(force=True)
            elif not site["is_observed"] and not is_bookkeeping(site) and name not in undrawn:
                name = _free(site_map.get(name, name))
                self.add(draw, name, *_named(name, site, site_map))
        return indices

    def stacked(self) -> dict[str, np.ndarray]:
        """Arrays of shape (1, num_samples, ...); NaN in draws that lack the variable."""
        return {name: self._stack(column)[None] for name, column in self.draws.items()}

    def _stack(self, column: dict[int, np.ndarray]) -> np.ndarray:
        if len(column) == self.num_samples:
            return np.stack([column[draw] for draw in range(self.num_samples)])
        stacked = np.full((self.num_samples, *next(iter(column.values())).shape), np.nan)
        for draw, value in column.items():
            stacked[draw] = value
        return stacked

    def groups(self, targets: set[str]) -> dict[str, dict[str, np.ndarray]]:
        variables = self.stacked()
        return {
            "prior": {name: value for name, value in variables.items() if name not in targets},
            "prior_predictive": {name: value for name, value in variables.items() if name in targets},
        }


def _dims(program: _Variables, observed: _Variables, terms: _Variables) -> dict[str, dict[str, list[str]]]:
    return {
        "prior": program.dims,
        "prior_predictive": program.dims,
        "observed_data": observed.dims,
        "sample_stats": terms.dims,
    }


def _named(name: str, site: Mapping[str, Any], site_map: Mapping[str, str]) -> tuple[np.ndarray, list[str]]:
    """The value of a site with names for its dimensions; those of size 1 in no plate are dropped."""
    value = torch.as_tensor(site["value"])
    frames = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
    num_event = min(len(getattr(site["fn"], "event_shape", ())), value.dim())
    num_batch = max([value.dim() - num_event, *(-dim for dim in frames)])
    value = value.reshape((1,) * (num_batch + num_event - value.dim()) + value.shape)
    shape, kept, names = list(value.shape), [], []
    own = 0
    for position, size in enumerate(value.shape):
        frame = frames.get(position - num_batch) if position < num_batch else None
        if frame is not None:
            shape[position] = max(frame.size, size)
            names.append(_plate(frame.name, site_map))
        elif position < num_batch and size == 1:
            continue
        else:
            names.append(f"{name}_dim_{own}")
            own += 1
        kept.append(shape[position])
    return value.expand(shape).reshape(kept).numpy(force=True), names


_RESERVED = ("chain", "draw")
"""Names that ArviZ takes itself."""


def _plate(name: str, site_map: Mapping[str, str]) -> str:
    """The name of a plate's dimension."""
    name = site_map.get(name, name)
    return f"{name}_plate" if name in _RESERVED else name


def _free(name: str) -> str:
    """The name of a site's variable."""
    return f"{name}_site" if name in _RESERVED else name


def _coords(coords: Mapping[str, Any], dims: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The labels that the user has given. Raises ValueError where no site has such a dimension."""
    known = sorted({dim for names in dims for dim in names})
    named = {_plate(name, {}): labels for name, labels in coords.items()}
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ValueError(
            f"no site has a dimension {unknown[0]!r} for coords; there are {listing(known)}.{nearest(unknown[0], known)}"
        )
    return named
