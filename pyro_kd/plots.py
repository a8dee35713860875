"""Figures of a distillation: loss curves, the loss by site, draws of teacher against student, grids of images.

Each function draws on the axes that it is given, or on a new figure of pyplot's, and returns the axes; none shows a figure or
changes matplotlib's settings. The draws come from :func:`~pyro_kd.diagnosis.inference_data.to_inference_data`; density curves are our
own, since ArviZ 0.23 and 1.x have no function for them in common. Knows numbers and arrays, and no programs.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_kd.diagnosis.columns import density_curve, joint_columns, single_columns, thin
from pyro_kd.diagnosis.inference_data import InferencePair
from pyro_kd.diagnosis.reports import SiteReport
from pyro_kd.errors import listing, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["densities", "loss_curves", "pairs", "sample_grid", "site_bars"]

TEACHER, STUDENT = "#1b4965", "#e07a2f"  # dark blue and orange: apart in greyscale and to the colour-blind
MAX_POINTS = 800
"""Points of a cloud, a program."""
MAX_BARS = 40
"""Whole values up to which a law is drawn as bars."""


def loss_curves(history: Mapping[str, Sequence[float]], columns: Sequence[str] | None = None, *, ax: Any = None) -> "Axes":
    """Curves of a training run against its steps; the loss axis is logarithmic where all values are positive.

    Args:
        history: columns of equal length: ``"step"``, and others such as ``"loss"``, ``"term/z"``, ``"validation/loss"``. NaN or
            None where a step has no value: the curve goes on from the value before.
        columns: which to draw; None: ``loss`` and its parts, the terms, and the losses of other data (``.../loss``).
        ax: axes to draw on; None makes a figure.

    Returns:
        The axes: a line a column, labelled with its name.

    Raises:
        KeyError: a column is missing.
        ValueError: a column has another length than ``step``.
    """
    if columns is None:
        columns = [
            name for name in history if name == "loss" or name.startswith(("loss/", "term/")) or name.endswith("/loss")
        ]
    for name in ("step", *columns):
        if name not in history:
            raise KeyError(f"the history has no column {name!r}; it has {listing(history)}.{nearest(name, history)}")
    ax = _axes(ax, 1)[0]
    steps, drawn = _column(history["step"]), [np.empty(0)]
    for name in columns:
        values = _column(history[name])
        if values.shape != steps.shape:
            raise ValueError(
                f"column {name!r} has {len(values)} values, and 'step' has {len(steps)}: give NaN where there is none"
            )
        known = ~np.isnan(values)
        drawn.append(values[known])
        style = {"linewidth": 1.8, "color": "black"} if name == "loss" else {"linewidth": 1.2}
        if name.endswith("/loss"):
            style |= {"linestyle": "--", "linewidth": 1.8}
        ax.plot(steps[known], values[known], marker="." if known.sum() == 1 else None, label=name, **style)
    values = np.concatenate(drawn)
    if len(values) and values.min() > 0:
        ax.set_yscale("log")
    ax.set(xlabel="step", ylabel="loss and terms (nats)")
    ax.legend(frameon=False)
    return _clean(ax)


def site_bars(report: SiteReport, *, axes: Any = None) -> np.ndarray:
    """Bars of each site's part of the loss, with two standard errors, and of the gradient that it sends to the student.

    Args:
        report: of :func:`~pyro_kd.diagnosis.reports.site_report`.
        axes: two axes to draw on; None makes a figure.

    Returns:
        Array of two axes: ``weight * term``, and the norm of its gradient; a bar a site, the first on top.
    """
    axes = _axes(axes, 2, height=0.4 * len(report.rows) + 1.2)
    rows = [row for row in report.rows if row.term is not None and row.weight is not None]
    names = [row.name for row in rows]
    colours = [TEACHER if row.kind == "target" else STUDENT for row in rows]
    parts = [row.weight * row.term.mean for row in rows if row.term and row.weight is not None]
    errors = [2 * abs(row.weight) * row.term.standard_error for row in rows if row.term and row.weight is not None]
    norms = [row.gradient_norm or 0.0 for row in rows]
    bars = axes[0].barh(names, parts, xerr=np.nan_to_num(errors), color=colours, error_kw={"capsize": 3, "ecolor": "0.3"})
    shares = ["" if row.share is None else f" {100 * row.share:.1f} %" for row in rows]
    axes[0].bar_label(bars, shares, padding=4, fontsize="small", color="0.3")
    axes[0].set(xlabel=f"weight times term ({report.unit} a call)", ylabel="site")
    axes[1].barh(names, norms, color=colours)
    axes[1].set(xlabel=f"gradient norm ({report.unit} a unit)")
    axes[1].tick_params(labelleft=False)
    axes[0].margins(x=0.2)
    for ax in axes:
        _clean(ax).invert_yaxis()
    _legend(axes[1], {kind: colour for kind, colour in (("target", TEACHER), ("latent", STUDENT)) if colour in colours})
    return axes


def densities(pair: InferencePair, sites: Sequence[str] | None = None, *, axes: Any = None) -> np.ndarray:
    """The laws of single variables, teacher against student: density curves, or bars where values are whole numbers.

    Draws and plates are pooled; each entry of an event has a panel (the first six of a large one).

    Args:
        pair: of :func:`~pyro_kd.diagnosis.inference_data.to_inference_data`.
        sites: which sites to draw; None: all that both programs have.
        axes: as many axes as there are panels; None makes a figure.

    Returns:
        One-dimensional array of axes, a panel a variable: the teacher's curve or bars first.

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
    """The joint laws of variables two by two, teacher against student, as clouds of points; their own laws on the diagonal.

    Args:
        pair: of :func:`~pyro_kd.diagnosis.inference_data.to_inference_data`.
        sites: sites with two variables or more between them (a site whose event has two entries has two). Dimensions that
            they share, such as a plate, are matched.
        axes: array of n by n axes for n variables; None makes a figure.

    Returns:
        Array of n by n axes; those above the diagonal are switched off.

    Raises:
        UnknownTargetError: a site is not in both programs.
        ValueError: the sites have a single variable.
    """
    columns = joint_columns(pair, sites)
    count = len(columns)
    if count < 2:
        raise ValueError(
            f"pairs needs two variables or more, and {listing(sites)} has one: densities(pair) shows single ones"
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
    """Images in rows and columns, on one scale from the smallest to the largest value.

    Args:
        images: of shape (n, height, width), or (n, channels, height, width) with 1 or 3 channels.
        columns: images a row.
        ax: axes to draw on; None makes a figure.

    Returns:
        The axes, with one picture of all images in it.

    Raises:
        ValueError: the shape is another.
    """
    tiles = torch.as_tensor(images).detach().cpu().double()
    tiles = tiles[:, None] if tiles.dim() == 3 else tiles
    if tiles.dim() != 4 or tiles.shape[1] not in (1, 3) or not len(tiles):
        raise ValueError(
            f"images must have shape (n, height, width) or (n, 1 or 3, height, width), not {tuple(np.shape(images))}"
        )
    low, high = tiles.min(), tiles.max()
    tiles = (tiles - low) / (high - low if high > low else 1.0)
    columns = min(columns, len(tiles))
    blank = -len(tiles) % columns
    tiles = torch.nn.functional.pad(tiles, (0, 1, 0, 1), value=1.0)  # a white line between images
    tiles = torch.cat([tiles, torch.ones(blank, *tiles.shape[1:])])
    tiles = tiles.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[:-1, :-1]
    ax = _axes(ax, 1, height=4.8 * tiles.shape[0] / tiles.shape[1] + 0.2)[0]
    ax.imshow(tiles.squeeze(-1).numpy(), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.set_axis_off()
    return ax


def _axes(axes: Any, count: int, *, columns: int | None = None, height: float | None = None) -> np.ndarray:
    """The axes given, or those of a new figure: a flat array of ``count``."""
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
    """Points of teacher and student in turn, so that neither covers the other."""
    picked = thin(min(map(len, x)), MAX_POINTS)
    points = [np.stack([column[picked] for column in columns], 1).reshape(-1) for columns in (x, y)]
    ax.scatter(*points, c=[TEACHER, STUDENT] * len(picked), s=7, alpha=0.5, linewidths=0)


def _law(ax: Any, mine: np.ndarray, yours: np.ndarray) -> None:
    """The law of one variable in both programs: bars of whole values, a line at a point mass, or a density."""
    both = np.concatenate([mine, yours])
    values = np.unique(both)
    whole = len(values) <= MAX_BARS and bool((values == np.round(values)).all())
    ax.set_ylabel("probability" if whole else "density")
    if whole:
        ax.locator_params(axis="x", integer=True)
    low, high = np.quantile(both, [0.005, 0.995])
    margin = 0.1 * (high - low)
    grid = np.linspace(low - margin, high + margin, 200)
    for draws, colour, label, side in ((mine, TEACHER, "teacher", -0.2), (yours, STUDENT, "student", 0.2)):
        if whole:
            ax.bar(values + side, [(draws == value).mean() for value in values], 0.4, color=colour, label=label)
        elif np.ptp(draws) == 0:
            ax.axvline(draws[0], color=colour, label=label)
        else:
            density = density_curve(draws, grid)
            ax.plot(grid, density, color=colour, label=label)
            ax.fill_between(grid, density, color=colour, alpha=0.15, linewidth=0)
            ax.set_ylim(bottom=0)
