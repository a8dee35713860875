"""How the experiments draw: figures without a display, a sentence under each that explains its labels, small files.

Matplotlib and Pillow are optional packages, so they are imported inside the functions.
"""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MAX_PICTURE_BYTES", "save", "save_grid", "subplots"]

MAX_PICTURE_BYTES = 300_000
"""The largest picture that docs/ takes."""


def subplots(rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, as ``matplotlib.pyplot.subplots`` makes them, without a display."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, layout="constrained", **options)


def save(figure: Any, path: Path, note: str = "", *, dpi: int = 110) -> None:
    """Write a figure and close it, with a sentence under it that says what its labels mean."""
    import matplotlib.pyplot as plt

    if note:
        figure.supxlabel(textwrap.fill(note, round(14 * figure.get_figwidth())), fontsize=9, color="0.3")
    figure.savefig(path, dpi=dpi, bbox_inches="tight")  # a layout with images of a fixed aspect may cut labels
    plt.close(figure)


def save_grid(rows: Mapping[str, Tensor], path: Path, note: str = "", *, columns: int = 12) -> None:
    """Draw one row of images per label, with values from 0 to 1 and shape (n, channels, size, size)."""
    from PIL import Image

    side = next(iter(rows.values())).shape[-1] + 2
    frame = torch.cat(
        [
            torch.cat([nn.functional.pad(image, (1, 1, 1, 1), value=1.0) for image in images[:columns]], 2)
            for images in rows.values()
        ],
        1,
    )
    figure, ax = subplots(1, 1, figsize=(0.6 * columns + 3.0, 0.6 * len(rows) + 0.6))
    ax.imshow(frame.permute(1, 2, 0).clamp(0, 1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_yticks([side * (i + 0.5) for i in range(len(rows))], list(rows))
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    save(figure, path, note, dpi=90)
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    for colours in (256, 128, 96, 64):  # as many as make a file that docs/ takes
        picture.quantize(colours).save(path, optimize=True)
        if path.stat().st_size <= MAX_PICTURE_BYTES:
            break
