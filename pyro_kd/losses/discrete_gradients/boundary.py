r"""The boundary gradient through discrete latents that share noise: the loss on both sides of a step.

The loss is :math:`E_\epsilon f(z'(\epsilon), z(\epsilon; \theta))`. The student's draw z jumps where its uniform noise u passes an
end e of an interval (:func:`~pyro_kd.noise.steps.ends_of`). When e moves, the loss changes by the difference of f on its two sides,
at that very noise, which the teacher shares:

.. math::
    \nabla_\theta E f = E[\nabla_\theta f] + \sum_i \sum_e E\big[ f(z'(e), z^-) - f(z'(e), z^+) \,\big|\, u_i = e \big]\,
    \nabla_\theta e.

For a bit, e = p, and the sides are 1 and 0. Flipping the bit without moving the shared noise would be biased: the teacher would not
see :math:`u = p`. An end of a count is chosen at random, those next to the student's draw, and the difference is divided by its
probability.

A category is drawn by a race of exponential times, and jumps where the time of one ties with the first of the others
(:func:`~pyro_kd.noise.steps.ties_of`); each of the two that tie counts half.

One element of the student's draws ("unit") is changed at a time: one at random in each row, times the number of units
(``"boundary"``), or all in turn (``"boundary_all"``). Each change costs a run of the teacher and two of the student, without
gradients.

Targets keep their noise: one that comes before the unit keeps its value, and a later one moves with the teacher's latents.

The estimate is unbiased, except where student and teacher are equal: there the loss has a kink.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_kd.errors import UnsupportedGradientError
from pyro_kd.losses.discrete_gradients.choice import DiscreteGradients, unsupported
from pyro_kd.losses.discrete_gradients.rerun import Rerun, record_of
from pyro_kd.losses.discrete_gradients.rows import Rows, values_of
from pyro_kd.losses.giving import OwnDraw
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.noise.laws import Draw, NoiseLaw, convert
from pyro_kd.noise.steps import ends_of, neighbour_beyond, ties_of
from pyro_kd.sites.categories import num_categories

__all__ = ["boundary_surrogate"]

_NUDGE = 1e-6  # how far from an end the noise is put on its sides, as a share of the interval there


class _Units(NamedTuple):
    """The elements of one site, each with an end that was chosen, at which the draw jumps.

    Attributes:
        end: the end times the density of the noise there, over the probability with which it was chosen; differentiable.
        below, above: noise on its two sides.
        noise: the noise of the draw.
        event_dim: number of dimensions on the right that are no batch dimensions. All four tensors have the same shape.
    """

    end: Tensor
    below: Tensor
    above: Tensor
    noise: Tensor
    event_dim: int


def boundary_surrogate(
    run: PairedRun, weights: Mapping[str, Any], gradients: DiscreteGradients, loss: Any, rerun: Rerun
) -> Tensor | None:
    """A scalar tensor whose gradient is the boundary part of the loss's; None if no site asks for it.

    Args:
        run: the run, with its noise.
        weights: the weights of its terms.
        gradients: which site asks for which gradient.
        loss: the loss, for its options.
        rerun: runs the two programs on changed noise.

    Raises:
        UnsupportedGradientError: a family is not drawn from one uniform number, or draws outside of sample sites cannot be repeated.
    """
    boundary, parts = _Boundary(run, weights, gradients, loss, rerun), []
    for kind in ("boundary", "boundary_all"):
        units = {name: _units(name, own, kind) for name, own in run.drawn.items() if gradients.at(name, own.fn) == kind}
        if not units:
            continue
        boundary.check_repeatable(next(iter(units)), kind)
        boundary.check_targets(units, kind)
        rows = Rows.after(run.student, units)
        count = sum(unit.end.numel() for unit in units.values()) // max(torch.Size(rows.shape).numel(), 1)
        device = next(iter(units.values())).end.device
        parts += [factor * boundary.effect(units, rows, chosen) for chosen, factor in _choices(kind, count, rows, device)]
    return torch.stack(parts).sum() if parts else None


@dataclass(frozen=True)
class _Boundary:
    """A run whose draws are changed; see :func:`boundary_surrogate`."""

    run: PairedRun
    weights: Mapping[str, Any]
    gradients: DiscreteGradients
    loss: Any
    rerun: Rerun

    def effect(self, units: Mapping[str, _Units], rows: Rows, chosen: Tensor) -> Tensor:
        """The effect on the loss of moving the ends of one unit in each row: a scalar tensor.

        Args:
            units: the units of each site.
            rows: the independent rows.
            chosen: the number of the unit in each row, of the shape of the rows.
        """
        first, moved, below, above, taught = 0, [], {}, {}, {}
        for name, unit in units.items():
            number = _numbers(unit, rows) + first
            first += number.numel()
            here = number == chosen.reshape([*chosen.shape, *[1] * unit.event_dim])
            moved.append(rows.sum(torch.where(here, unit.end, 0.0), unit.event_dim))
            draw = self.run.drawn[name].noise[0]
            below[name], above[name] = (
                replace(draw, noise=torch.where(here, side, unit.noise).reshape(draw.noise.shape))
                for side in (unit.below, unit.above)
            )
            is_shared = name not in self.loss.fresh or name in self.loss.site_map
            if is_shared and self.gradients.site_map.get(name, name) in self.run.noise:
                taught[self.gradients.site_map.get(name, name)] = self.for_teacher(name, above[name], here)
        drawn = {name: own.noise for name, own in self.run.drawn.items()}
        runs = self.rerun.on(record_of(self.run.noise, taught), [record_of(drawn, below), record_of(drawn, above)])
        costs = [[rows.sum(value) for value in values_of(run, self.weights, self.loss).values()] for run in runs]
        before, after = (sum(parts[1:], parts[0]) for parts in costs)
        return (sum(moved[1:], moved[0]) * (before - after)).sum()

    def for_teacher(self, name: str, mine: Draw, here: Tensor) -> Draw:
        """The teacher's first draw at a site, changed as the student's is.

        Args:
            name: the student's name of the site.
            mine: the student's changed draw.
            here: where it is changed.
        """
        draw = self.run.noise[self.gradients.site_map.get(name, name)][0]
        changed = convert(mine.noise, mine.law, draw.law)
        if changed is None or draw.noise.shape != mine.noise.shape:
            reason = f"the teacher draws it from {draw.describe()}, which differs from the student's"
            raise unsupported(name, self.run.drawn[name].fn, "boundary", reason)
        return replace(draw, noise=torch.where(here.reshape(mine.noise.shape), changed, draw.noise.double()))

    def check_repeatable(self, name: str, kind: str) -> None:
        """Raise UnsupportedGradientError where the programs draw outside of sample sites."""
        if self.run.between or any(self.run.noise.between.values()):
            where = ", ".join({draw.where for draw in self.run.between}) or "the teacher"
            reason = f"it runs both programs again on changed noise, which draws outside of sample sites ({where}) would not repeat"
            raise unsupported(name, self.run.drawn[name].fn, kind, reason)

    def check_targets(self, units: Collection[str], kind: str) -> None:
        """Raise UnsupportedGradientError where a target that comes before a unit would be another one in the runs on changed noise.

        The ends of the unit were computed for the target's value.
        """
        to_teacher = self.gradients.site_map
        drawn = {pair.name for pair in self.run.pairs if pair.is_target and not self.run.noise.get(pair.name)}
        if self.loss.target_values == "data" or not drawn:
            return
        before = None
        for name in self.run.student.nodes:
            if name in units and before is not None:
                reason = (
                    f"it runs the teacher again on the same noise, and that of target {before!r}, which comes before it, cannot be "
                    "recorded"
                )
                raise unsupported(name, self.run.drawn[name].fn, kind, reason)
            before = name if to_teacher.get(name, name) in drawn else before


def _choices(kind: str, count: int, rows: Rows, device: torch.device) -> Iterator[tuple[Tensor, int]]:
    """The number of the unit to change in each row, and a factor."""
    if kind == "boundary":
        yield torch.randint(count, rows.shape, device=device), count
        return
    for number in range(count):
        yield torch.full(rows.shape, number, device=device), 1


def _numbers(unit: _Units, rows: Rows) -> Tensor:
    """A number for each unit of a row, from 0, of a shape that broadcasts with the site's value."""
    shape = [
        1 if dim < -unit.event_dim and dim + unit.event_dim in rows.sizes else size
        for dim, size in zip(range(-unit.end.dim(), 0), unit.end.shape, strict=True)
    ]
    return torch.arange(torch.Size(shape).numel(), device=unit.end.device).reshape(shape)


def _units(name: str, own: OwnDraw, kind: str) -> _Units:
    try:
        count = num_categories(own.fn)
        return _steps(own) if count is None else _categories(own, count)
    except UnsupportedGradientError as error:
        raise unsupported(name, own.fn, kind, error.message) from error


def _categories(own: OwnDraw, count: int) -> _Units:
    """The categories of each element as units. Two categories tie on a surface, which both of them reach: each counts half."""
    is_index = own.value.shape.numel() * count == own.noise[0].noise.numel()  # and not a one-hot vector
    times = own.noise[0].noise.double().reshape([*own.value.shape, count] if is_index else own.value.shape)
    end = ties_of(own.fn, times)
    at = end.detach()
    below = (at * (1 - _NUDGE)).clamp(min=torch.finfo(at.dtype).tiny)
    return _Units(end * (-at).exp() / 2, below, at * (1 + _NUDGE), times, times.dim() - len(own.fn.batch_shape))


def _steps(own: OwnDraw) -> _Units:
    """The elements of bits and counts as units."""
    value = own.value.detach()
    ends = ends_of(own.fn, value)
    if own.noise[0].law is not NoiseLaw.UNIFORM or own.noise[0].noise.shape != value.shape:
        raise UnsupportedGradientError("its noise is not one uniform number per element")
    low, high = ends.low > 0, ends.high < 1
    upper = high & (~low | (torch.rand_like(ends.low.detach()) < 0.5))
    moves = low | high
    with torch.no_grad():
        beyond = ends_of(own.fn, torch.where(moves, neighbour_beyond(own.fn, value, high=upper), value))
        chance = ends.width / (low.double() + high.double()).clamp(min=1)
        chance = chance + beyond.width / ((beyond.low > 0).double() + (beyond.high < 1).double()).clamp(min=1)
        end = torch.where(upper, ends.high, ends.low)
        least = 8 * torch.finfo(own.noise[0].noise.dtype).eps
        before, after = torch.where(upper, ends.width, beyond.width), torch.where(upper, beyond.width, ends.width)
        before, after = (torch.minimum((_NUDGE * w).clamp(min=least), w / 2) for w in (before, after))
    movable = torch.where(upper, ends.high, ends.low) * torch.where(moves, 1 / chance, 0.0)
    noise = own.noise[0].noise.double()
    return _Units(movable, end - before, end + after, noise, value.dim() - len(own.fn.batch_shape))
