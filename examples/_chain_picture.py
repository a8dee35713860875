"""The picture of examples/error_accumulation.py: KL against depth."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from examples._methods import FORCED, LOCAL, MARGINAL, MULTI_SAMPLE, SURROGATE, explain
from examples._pictures import save, subplots
from examples._tables import Run, estimates

__all__ = ["draw_kl"]

COLOURS = {
    LOCAL: "tab:blue",
    f"{FORCED}, 1/4": "tab:green",
    f"{FORCED}, 1/2": "darkgreen",
    f"{FORCED}, coins": "yellowgreen",
    f"{FORCED}, 1/4, implicit": "tab:green",
    f"{FORCED}, 1/2, implicit": "darkgreen",
    f"{MULTI_SAMPLE}, from the start": "plum",
    f"{MULTI_SAMPLE}, local for 1/2": "tab:purple",
    f"{MARGINAL}, from the start": "tab:gray",
    f"{MARGINAL}, local for 1/2": "black",
    f"{SURROGATE}, lambda 1": "tab:red",
    f"{SURROGATE}, lambda 0.1": "tab:orange",
    f"{SURROGATE}, lambda 0": "tab:olive",
    f"{SURROGATE}, implicit": "tab:pink",
}


def draw_kl(runs: Sequence[Run], titles: Sequence[str], path: Path, meanings: Mapping[str, str]) -> None:
    """Draw KL against depth, one line per method: the mean over seeds, with a band of its standard error.

    Args:
        runs: the figures of each seed.
        titles: the families of chains, a panel each.
        path: the picture.
        meanings: words of the labels, see :func:`explain`.
    """
    figure, axes = subplots(1, len(titles), figsize=(5 + 4 * (len(titles) - 1), 6.0), sharey=True, squeeze=False)
    for ax, title in zip(axes[0], titles, strict=True):
        layers = runs[0][title]["layers"]
        rows = estimates([run[title] for run in runs], [f"kl {depth}" for depth in layers])
        for name, row in rows.items():
            mean = np.array([estimate.mean for estimate in row])
            error = np.nan_to_num([estimate.standard_error for estimate in row])
            colour, style = COLOURS.get(name, "tab:cyan"), "--" if name.split(",")[0] == LOCAL else "-"
            ax.plot(layers, mean, style, marker="o", markersize=4, color=colour, label=name)
            low = np.maximum(mean - error, mean / 3)  # on a log axis
            ax.fill_between(layers, low, mean + error, color=colour, alpha=0.15, linewidth=0)
        ax.set_yscale("log")
        ax.set_xticks(layers)
        ax.set_xlabel("layers L")
        ax.grid(axis="y", color="0.92")
        ax.set_title(title)
        ax.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    axes[0, 0].set_ylabel("KL(teacher || student) of y, nats")
    shown = [name for title in titles for name in runs[0][title]["models"]]
    kinds = [kind for kind in (LOCAL, SURROGATE, FORCED, MULTI_SAMPLE, MARGINAL) if any(kind in name for name in shown)]
    save(figure, path, explain(kinds, meanings))
