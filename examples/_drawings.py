"""What the experiment on drawings measures and draws: sets of drawings, their features, the distance between two sets, a picture.

Knows no models: a drawing is a sequence of points (dx, dy, pen_up), as :mod:`pyro_kd.datasets` gives them.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples._pictures import save, subplots
from pyro_kd.datasets import Standardisation
from pyro_kd.metrics import emd, mmd, nearest_neighbour_accuracy

__all__ = ["FEATURES", "Drawings", "distances", "draw_strokes", "features"]

FEATURES = {"step": "movement", "stroke": "stroke", "angle": "angle"}


@dataclass(frozen=True)
class Drawings:
    """A set of standardised drawings.

    Attributes:
        points: shape (n, length, 3).
        mask: true at the points that count, shape (n, length).
        scale: the standardisation of the movements.
    """

    points: Tensor
    mask: Tensor
    scale: Standardisation

    def __len__(self) -> int:
        return len(self.points)


def features(drawings: Drawings) -> dict[str, Tensor]:
    """What is compared: pens, lengths of movements, points per stroke, angles between movements, and whole drawings.

    Returns:
        By name; all of shape (values,), but ``drawing`` of shape (n, 3 * length).
    """
    mask = drawings.mask.cpu()
    moves = moves_of(drawings)
    pen = drawings.points[..., 2].cpu()
    ends = pen.bool()
    ends[torch.arange(len(mask)), mask.sum(1) - 1] = True  # the end of a drawing ends its last stroke
    places = torch.cat([torch.tensor([-1]), ends[mask].nonzero().squeeze(-1)])
    before, after = moves[:, :-1], moves[:, 1:]
    cross = before[..., 0] * after[..., 1] - before[..., 1] * after[..., 0]
    angle = torch.atan2(cross, (before * after).sum(-1)).abs()
    positions = moves.cumsum(1) * mask.unsqueeze(-1)
    return {
        "pen": pen[mask],
        "step": moves.norm(dim=-1)[mask],
        "stroke": places.diff().float(),
        "angle": angle[mask[:, 1:]],
        "drawing": torch.cat([positions, (pen * mask).unsqueeze(-1)], -1).flatten(1),
    }


def moves_of(drawings: Drawings) -> Tensor:
    """Movements of shape (n, length, 2) with the data's proportions, in units of the mean standard deviation of dx and dy."""
    return drawings.scale.restore(drawings.points[..., :2].cpu()) / drawings.scale.std.mean()


def distances(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """The distances between the features of two sets of drawings, by name; see :func:`features`."""
    found = {"pen": abs(float(one["pen"].mean() - other["pen"].mean()))}
    for name in FEATURES:
        found[name] = emd(one[name], other[name])
    rows = min(len(one["drawing"]), len(other["drawing"]), 1000)
    x, y = one["drawing"][:rows], other["drawing"][:rows]
    return {**found, "mmd": mmd(x, y), "neighbour": nearest_neighbour_accuracy(x, y)}


def draw_strokes(rows: Mapping[str, Drawings], path: Path, note: str = "") -> None:
    """Draw one row of drawings per label; all rows have the same number of drawings."""
    columns = len(next(iter(rows.values())))
    figure, axes = subplots(len(rows), 1, figsize=(columns + 1, 1.1 * len(rows) + 0.5))
    for ax, (name, drawings) in zip(axes, rows.items(), strict=True):
        for column, (moves, points, mask) in enumerate(
            zip(moves_of(drawings), drawings.points.cpu(), drawings.mask.cpu(), strict=True)
        ):
            for stroke in strokes_in_cell(moves[mask], points[mask, 2]):
                x, y = stroke.T.tolist()
                ax.plot([x + column for x in x], y, color="black", lw=1, marker="." if len(x) == 1 else None, ms=2)
        # y goes down, as on a screen
        ax.set(xlim=(-0.5, columns - 0.5), ylim=(0.5, -0.5), aspect="equal", xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.spines[:].set_visible(False)
    save(figure, path, note, dpi=100)


def strokes_in_cell(moves: Tensor, pen: Tensor, size: float = 0.8) -> list[Tensor]:
    """The strokes of one drawing as positions of shape (points, 2), moved and scaled to fit a square around 0 with sides ``size``.

    Args:
        moves: shape (points, 2).
        pen: 1 where the pen is lifted after the point, shape (points,).
        size: side of the square.
    """
    positions = moves.cumsum(0)
    low, high = positions.min(0).values, positions.max(0).values
    positions = (positions - (low + high) / 2) * (size / float((high - low).max().clamp(min=1e-6)))
    ends = [0, *(pen.nonzero().squeeze(-1) + 1).tolist(), len(pen)]
    return [positions[a:b] for a, b in itertools.pairwise(ends) if b > a]
