"""Draws docs/concepts/semi_auxiliary.svg: `python docs/concepts/draw_semi_auxiliary.py`. Knows matplotlib alone."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot
from matplotlib.patches import Circle, FancyArrowPatch

TEACHER, STUDENT, NOISE, TEXT = "#1b4965", "#e07a2f", "#6b6b6b", "#333333"
COLUMNS = {"1": 1.0, "2": 3.0, "y": 5.0}  # of the sites z1 -> z2 -> y
ROWS = {"teacher": 4.0, "noise": 2.5, "student": 1.0}
RADIUS = 0.36


def draw(path: Path) -> None:
    """Write the picture: the teacher above, the student below, and between them the noise that both run on."""
    figure, ax = pyplot.subplots(figsize=(9.0, 4.4))
    ax.set(xlim=(-1.3, 9.1), ylim=(0.2, 5.0), aspect="equal")
    ax.set_axis_off()
    for program, colour, mark in (("teacher", TEACHER, ""), ("student", STUDENT, "'")):
        height = ROWS[program]
        ax.text(-1.2, height, program, color=colour, fontsize=13, va="center", weight="bold")
        for name, x in COLUMNS.items():
            label = rf"$z_{name}{mark}$" if name != "y" else "$y$"
            node(ax, (x, height), label, colour, is_filled=name == "y")
        for start, end in (("1", "2"), ("2", "y")):
            arrow(ax, (COLUMNS[start], height), (COLUMNS[end], height), colour)
    ax.text(-1.2, ROWS["noise"], "noise", color=NOISE, fontsize=13, va="center", weight="bold")
    for name in ("1", "2"):
        x = COLUMNS[name]
        node(ax, (x, ROWS["noise"]), rf"$\epsilon_{name}$", NOISE)
        arrow(ax, (x, ROWS["noise"]), (x, ROWS["teacher"]), NOISE)
        arrow(ax, (x, ROWS["noise"]), (x, ROWS["student"]), NOISE)
    arrow(ax, (COLUMNS["y"], ROWS["teacher"]), (COLUMNS["y"], ROWS["student"]), TEACHER, style="dashed")
    ax.text(COLUMNS["y"] + 0.15, ROWS["noise"], "the value of y", color=TEACHER, fontsize=10, va="center")
    ax.text(5.7, ROWS["teacher"], r"$p(y \mid \epsilon_1, \epsilon_2)$", color=TEACHER, fontsize=13, va="center")
    ax.text(5.7, ROWS["student"], r"$q_\theta(y \mid \epsilon_1, \epsilon_2)$", color=STUDENT, fontsize=13, va="center")
    ax.text(7.35, ROWS["noise"], r"$d(p, q_\theta, y)$", color=TEXT, fontsize=13, va="center")
    for program in ("teacher", "student"):
        arrow(ax, (7.5, ROWS[program]), (8.0, ROWS["noise"]), TEXT, shrink=16)
    with mpl.rc_context({"svg.hashsalt": "pyro_kd"}):  # the same file in each run
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)


def node(ax: Any, centre: tuple[float, float], label: str, colour: str, *, is_filled: bool = False) -> None:
    """A circle with a label in it."""
    ax.add_patch(
        Circle(centre, RADIUS, facecolor=colour if is_filled else "white", edgecolor=colour, linewidth=1.8, zorder=2)
    )
    ax.text(*centre, label, color="white" if is_filled else colour, fontsize=14, ha="center", va="center", zorder=3)


def arrow(
    ax: Any, start: tuple[float, float], end: tuple[float, float], colour: str, *, style: str = "solid", shrink: float = 24
) -> None:
    """An arrow between the circles at two centres."""
    options: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 14, "linestyle": style, "color": colour}
    ax.add_patch(FancyArrowPatch(start, end, shrinkA=shrink, shrinkB=shrink, linewidth=1.5, zorder=1, **options))


if __name__ == "__main__":
    draw(Path(__file__).with_name("semi_auxiliary.svg"))
