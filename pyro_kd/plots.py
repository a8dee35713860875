"""Figures of a distillation: loss curves, the loss by site, draws of teacher and student, grids of images.

Each function draws on the given axes, or on a new pyplot figure, and returns the axes. None shows a figure or
changes matplotlib's settings. The draws come from :func:`~pyro_kd.diagnosis.inference_data.to_inference_data`. Density curves are our
own, since ArviZ 0.23 and 1.x have no common function for them. Knows numbers and arrays, and no programs.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_kd.diagnosis.columns import density_curve, first_draw, joint_columns, single_columns, thin
from pyro_kd.diagnosis.inference_data import InferencePair
from pyro_kd.diagnosis.reports import SiteReport
from pyro_kd.errors import listing, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["densities", "loss_curves", "paired_images", "pairs", "sample_grid", "site_bars"]

TEACHER, STUDENT = "#1b4965", "#e07a2f"  # dark blue and orange, distinct in greyscale and to the colour-blind
MAX_POINTS = 800
"""Points of a cloud per program."""
MAX_BARS = 40
"""Up to this number of different whole values, a law is drawn as bars."""


def loss_curves(history: Mapping[str, Sequence[float]], columns: Sequence[str] | None = None, *, ax: Any = None) -> "Axes":
    """Plot the columns of a training history against its steps.

    The loss axis is logarithmic if no value is negative, and linear around 0 if some are 0. If some are negative, it
    is linear, and curves a hundred times smaller than the largest get their own axis on the right.

    Args:
        history: columns of equal length: ``"step"``, and others such as ``"loss"``, ``"term/z"``, ``"validation/loss"``. A step
            without a value has NaN or None, and the curve continues from the value before.
        columns: the columns to draw. None: ``loss`` and its parts, the terms, and the losses of other data (``.../loss``).
        ax: the axes to draw on; None makes a figure.

    Returns:
        The axes, with one line per column, labelled with its name. An axis on the right is the figure's last.

    Raises:
        KeyError: a column is missing.
        ValueError: a column and ``step`` differ in length.
    """
    if columns is None:
        columns = [
            name for name in history if name == "loss" or name.startswith(("loss/", "term/")) or name.endswith("/loss")
        ]
    for name in ("step", *columns):
        if name not in history:
            raise KeyError(f"the history has no column {name!r}; it has {listing(history)}.{nearest(name, history)}")
    ax = _axes(ax, 1)[0]
    steps, curves = _column(history["step"]), dict[str, np.ndarray]()
    for name in columns:
        curves[name] = _column(history[name])
        if curves[name].shape != steps.shape:
            raise ValueError(
                f"column {name!r} has {len(curves[name])} values, but 'step' has {len(steps)}: give NaN for steps without a value"
            )
    small = _small_beside_negative(curves)
    right = ax.twinx() if small else None
    for index, (name, values) in enumerate(curves.items()):
        known = ~np.isnan(values)
        style: dict[str, Any] = {"linewidth": 1.4, "color": f"C{index}"}
        if name == "loss":
            style = {"linewidth": 1.0, "color": "0.6", "zorder": 1.5}  # under the terms
        elif name.endswith("/loss"):
            style |= {"linestyle": "--", "linewidth": 1.8}
        is_sparse = known.sum() <= max(1, len(steps) // 5)
        where, label = (ax, name) if right is None or name not in small else (right, f"{name} (right)")
        where.plot(steps[known], values[known], marker="." if is_sparse else None, label=label, **style)
    _scale_losses(ax, [values for name, values in curves.items() if name not in small])
    ax.set(xlabel="step", ylabel="loss and terms (nats)")
    lines = list(ax.lines)
    if right is not None:
        _scale_losses(right, [curves[name] for name in small])
        right.set(ylabel="small terms (nats)")
        right.spines["top"].set_visible(False)
        lines += right.lines
    ax.legend(lines, [line.get_label() for line in lines], frameon=False)
    return _clean(ax)


def _small_beside_negative(curves: Mapping[str, np.ndarray]) -> list[str]:
    """The curves that would be too flat on a linear axis with the largest one; none if no value is negative."""
    known = {name: values[~np.isnan(values)] for name, values in curves.items()}
    if all(values.min(initial=0.0) >= 0 for values in known.values()):
        return []
    sizes = {name: np.abs(values).max() for name, values in known.items() if np.any(values)}
    return [name for name, size in sizes.items() if 100 * size < max(sizes.values())]


def _scale_losses(ax: Any, curves: Sequence[np.ndarray]) -> None:
    """Use a logarithmic scale if no value is negative; linear up to the typical size of the smallest curve if some are 0."""
    known = [curve[~np.isnan(curve)] for curve in curves]
    sizes = [np.median(curve[curve > 0]) for curve in known if np.any(curve > 0)]
    if not sizes or any(curve.min(initial=0.0) < 0 for curve in known):
        return
    if all(curve.min(initial=1.0) > 0 for curve in known):
        ax.set_yscale("log")
    else:
        ax.set_yscale("symlog", linthresh=min(sizes))
        ax.set_ylim(bottom=-0.2 * min(sizes))


def site_bars(report: SiteReport, *, axes: Any = None) -> np.ndarray:
    """Plot each site's part of the loss, with two standard errors, and its gradient to the student, as bars.

    Args:
        report: the result of :func:`~pyro_kd.diagnosis.reports.site_report`.
        axes: two axes to draw on; None makes a figure.

    Returns:
        Array of two axes: ``weight * term``, and the norm of its gradient, with one bar per site, the first on top.
    """
    axes = _axes(axes, 2, height=0.4 * len(report.sites) + 1.2)
    rows = [row for row in report.sites if row.term is not None and row.weight is not None]
    names = [row.name for row in rows]
    colours = [TEACHER if row.kind == "target" else STUDENT for row in rows]
    parts = [row.weight * row.term.mean for row in rows if row.term and row.weight is not None]
    errors = [2 * abs(row.weight) * row.term.standard_error for row in rows if row.term and row.weight is not None]
    norms = [row.gradient_norm or 0.0 for row in rows]
    bars = axes[0].barh(names, parts, xerr=np.nan_to_num(errors), color=colours, error_kw={"capsize": 3, "ecolor": "0.3"})
    shares = ["" if row.share is None else f" {100 * row.share:.1f} %" for row in rows]
    axes[0].bar_label(bars, shares, padding=4, fontsize="small", color="0.3")
    axes[0].set(xlabel=f"weight times term ({report.unit} per call)", ylabel="site")
    axes[1].barh(names, norms, color=colours)
    axes[1].set(xlabel=f"gradient norm ({report.unit} per unit)")
    axes[1].tick_params(labelleft=False)
    axes[0].margins(x=0.2)
    for ax in axes:
        _clean(ax).invert_yaxis()
    _legend(axes[1], {kind: colour for kind, colour in (("target", TEACHER), ("latent", STUDENT)) if colour in colours})
    return axes


def densities(pair: InferencePair, sites: Sequence[str] | None = None, *, axes: Any = None) -> np.ndarray:
    """Plot the laws of single variables in teacher and student: as density curves, or as bars of whole numbers.

    Draws and plates are pooled. Each entry of an event has a panel, or the first six entries of a large event.

    Args:
        pair: the result of :func:`~pyro_kd.diagnosis.inference_data.to_inference_data`.
        sites: the sites to draw. None: all that both programs have.
        axes: one for each panel; None makes a figure.

    Returns:
        One-dimensional array of axes, one per variable, with the teacher's curve or bars first.

    Raises:
        UnknownTargetError: a site is not in both programs.
    """
    columns = single_columns(pair, sites)
    axes = _axes(axes, len(columns))
    for ax, (label, (mine, yours)) in zip(axes, columns.items(), strict=True):
        _law(ax, mine, yours)
        _clean(ax).set(xlabel=label)
    _legend(axes[0], {"teacher": TEACHER, "student": STUDENT})
    return axes


def pairs(pair: InferencePair, sites: Sequence[str], *, axes: Any = None) -> np.ndarray:
    """Plot the joint laws of pairs of variables in teacher and student as clouds of points, with single laws on the diagonal.

    Args:
        pair: the result of :func:`~pyro_kd.diagnosis.inference_data.to_inference_data`.
        sites: sites that have at least two variables together (a site whose event has two entries has two). Dimensions that
            they share, such as a plate, are matched.
        axes: array of n by n axes for n variables; None makes a figure.

    Returns:
        Array of n by n axes. Those above the diagonal are switched off.

    Raises:
        UnknownTargetError: a site is not in both programs.
        ValueError: the sites have a single variable.
    """
    columns = joint_columns(pair, sites)
    count = len(columns)
    if count < 2:
        raise ValueError(
            f"pairs needs at least two variables, but {listing(sites)} has one: densities(pair) shows single ones"
        )
    axes = _axes(axes, count * count, columns=count).reshape(count, count)
    for i, (below, (mine_y, yours_y)) in enumerate(columns.items()):
        for j, (left, (mine_x, yours_x)) in enumerate(columns.items()):
            ax = _clean(axes[i, j])
            if j > i:
                ax.set_axis_off()
                continue
            if i == j:
                _law(ax, mine_x, yours_x)
            else:
                _cloud(ax, (mine_x, yours_x), (mine_y, yours_y))
                ax.set(ylabel=below)
            ax.set(xlabel=left)
    _legend(axes[0, 0], {"teacher": TEACHER, "student": STUDENT})
    return axes


def sample_grid(images: Tensor | np.ndarray, *, columns: int = 8, ax: Any = None) -> "Axes":
    """Plot images in rows and columns, on a common scale from the smallest to the largest value. NaN and infinities are red.

    Args:
        images: of shape ``(n, height, width)``, or ``(n, channels, height, width)`` with 1 or 3 channels.
        columns: the number of images in a row.
        ax: the axes to draw on; None makes a figure.

    Returns:
        The axes, with a single picture of all images.

    Raises:
        ValueError: the images have a different shape, or there are no columns.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    tiles = _as_tensor(images)
    tiles = tiles[:, None] if tiles.dim() == 3 else tiles
    if tiles.dim() != 4 or tiles.shape[1] not in (1, 3) or not len(tiles):
        raise ValueError(
            f"images must have shape (n, height, width) or (n, 1 or 3, height, width), not {tuple(np.shape(images))}"
        )
    finite = tiles.isfinite()
    known = tiles[finite] if finite.any() else torch.zeros(1)
    low, high = known.min(), known.max()
    tiles = torch.where(finite, (tiles - low) / (high - low if high > low else 1.0), 0.0)
    if not finite.all():
        red = torch.tensor([1.0, 0.0, 0.0]).reshape(3, 1, 1).double()
        tiles = torch.where(finite.all(1, keepdim=True), tiles.expand(-1, 3, -1, -1), red)
    columns = min(columns, len(tiles))
    blank = -len(tiles) % columns
    tiles = torch.nn.functional.pad(tiles, (0, 1, 0, 1), value=1.0)  # a white line between images
    tiles = torch.cat([tiles, torch.ones(blank, *tiles.shape[1:])])
    tiles = tiles.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[:-1, :-1]
    ax = _axes(ax, 1, height=4.8 * tiles.shape[0] / tiles.shape[1] + 0.2)[0]
    ax.imshow(tiles.squeeze(-1).numpy(), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.set_axis_off()
    return ax


def paired_images(pair: InferencePair, site: str, *, rows: int = 8, ax: Any = None) -> "Axes":
    """Plot images of both programs from the same noise: those of the teacher above, those of the student below.

    Args:
        pair: draws of teacher and student; the first is shown.
        site: a site of images, by the teacher's name; a draw has shape (rows, height, width) or (rows, channels, height, width).
        rows: the number of images of each program.
        ax: the axes to draw on; None makes a figure.

    Returns:
        The axes, with a single picture of all images.

    Raises:
        UnknownTargetError: a program does not have the site.
        ValueError: the site has a different shape.
    """
    drawn = [values[:rows] for values in first_draw(pair, site)]
    ax = sample_grid(np.concatenate(drawn), columns=len(drawn[0]), ax=ax)
    ax.set_title(f"{site}: teacher above, student below, on the same noise", fontsize=9)
    return ax


def _as_tensor(images: Any) -> Tensor:
    """A copy in float64 on the CPU, also of a list of tensors or of an array that torch cannot share."""
    if isinstance(images, list | tuple) and all(isinstance(image, Tensor) for image in images):
        images = torch.stack(list(images)) if images else torch.zeros(0)
    if isinstance(images, Tensor):
        return images.detach().cpu().double()
    return torch.from_numpy(np.array(images, dtype=float))


def _axes(axes: Any, count: int, *, columns: int | None = None, height: float | None = None) -> np.ndarray:
    """The given axes, or those of a new figure, as a flat array of length ``count``."""
    if axes is not None:
        flat = np.ravel(np.asarray(axes, dtype=object))
        if len(flat) != count:
            raise ValueError(f"this plot needs {count} axes, not {len(flat)}")
        return flat
    from matplotlib import pyplot

    columns = columns or min(count, 3)
    rows = -(-count // columns)
    width = 6.4 if count == 1 else 3.4 * columns
    height = height or (4.2 if count == 1 else 2.6 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    for ax in grid.flat[count:]:
        figure.delaxes(ax)
    return np.asarray(grid.flat[:count])


def _clean(ax: Any) -> Any:
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _legend(ax: Any, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    ax.legend(
        handles=[Patch(color=colour, label=label) for label, colour in colours.items()], frameon=False, fontsize="small"
    )


def _column(values: Sequence[float]) -> np.ndarray:
    return np.array([np.nan if value is None else float(value) for value in values])


def _cloud(ax: Any, x: tuple[np.ndarray, np.ndarray], y: tuple[np.ndarray, np.ndarray]) -> None:
    """Draw points of teacher and student in turn, so that neither covers the other."""
    picked = thin(min(map(len, x)), MAX_POINTS)
    points = [np.stack([column[picked] for column in columns], 1).reshape(-1) for columns in (x, y)]
    ax.scatter(*points, c=[TEACHER, STUDENT] * len(picked), s=7, alpha=0.5, linewidths=0)


def _law(ax: Any, mine: np.ndarray, yours: np.ndarray) -> None:
    """Draw the law of one variable in both programs: as bars of whole values, a line at a point mass, or a density."""
    both = np.concatenate([mine, yours])
    values = np.unique(both)
    whole = len(values) <= MAX_BARS and bool((values == np.round(values)).all())
    ax.set_ylabel("probability" if whole else "density")
    if whole:
        ax.locator_params(axis="x", integer=True)
    for draws, colour, label, side in ((mine, TEACHER, "teacher", -0.2), (yours, STUDENT, "student", 0.2)):
        if whole:
            ax.bar(values + side, [(draws == value).mean() for value in values], 0.4, color=colour, label=label)
        elif np.ptp(draws) == 0:
            ax.axvline(draws[0], color=colour, label=label)
        else:
            low, high = np.quantile(draws, [0.005, 0.995])  # a grid for each law: one may be much narrower than the other
            margin = 0.25 * (high - low) or 0.25 * np.ptp(draws)
            grid = np.linspace(low - margin, high + margin, 200)
            density = density_curve(draws, grid)
            ax.plot(grid, density, color=colour, label=label)
            ax.fill_between(grid, density, color=colour, alpha=0.15, linewidth=0)
            ax.set_ylim(bottom=0)
