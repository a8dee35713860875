"""Quality against seconds, one picture a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples._pictures import save, subplots
from tests.benchmarks.time_to_quality.curves import final_quality
from tests.benchmarks.time_to_quality.variants import LOOP, Variant

__all__ = ["draw"]

COLOURS = ("#1b4965", "#3a9d5d", "#7b2d8b", "#2a9db5", "#b58b00", "#888888", "#5a5a9a", "#aa5577")
WIDEST = 7
"""The most variants beside the loop."""


def draw(variants: Mapping[Variant, Sequence[dict[str, Any]]], path: Path) -> None:
    """The first measure against processor time, a line a seed.

    Args:
        variants: the runs of each.
        path: of the picture.
    """
    first_run = variants[LOOP][0]
    first, title = next(iter(first_run["measures"].items()))
    most = max(variant.reuse for variant in variants)
    shown = [
        v
        for v in variants
        if v != LOOP and v.share == 1 and (v.reuse in (1, most) or v.capture != "off" or v.start != "own")
    ]
    if any(variant.start != "own" for variant in shown):  # of each start the loop, and the library's last form
        shown = list({(variant.who, variant.objective, variant.start): variant for variant in shown}.values())
    shown = shown[:WIDEST]
    figure, ax = subplots(1, 1, figsize=(7.2, 4.4))
    for variant, colour in zip([LOOP, *shown], ("#e07a2f", *COLOURS), strict=False):
        for index, run in enumerate(variants[variant]):
            label = variant.name if index == 0 else None
            seconds, values = run["cpu"][1:], run["values"][first][1:]
            style = "--" if variant.who == "loop" else "-"
            ax.plot(seconds, values, style, color=colour, label=label, linewidth=1.2, alpha=0.8, marker=".", markersize=3)
            if variant == LOOP:
                ax.axhline(final_quality(run["values"][first]), color=colour, linewidth=0.7, linestyle=":")
    lowest = min(min(run["values"][first]) for variant in [LOOP, *shown] for run in variants[variant])
    ax.set(xlabel="seconds of the processor, capture included", ylabel=title, yscale="log" if lowest > 0 else "linear")
    ax.set_title(f"{first_run['model']}: {first_run['sizes']}", fontsize=9)
    ax.legend(fontsize=7.5, framealpha=0.8, edgecolor="none")
    save(
        figure, path, "A line for each seed. Dotted: where the loop ends. m: the steps that each draw of the teacher serves."
    )
