"""What every example does at its end: a text table, and results.json with settings, runs and versions."""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyro
import torch

import pyro_kd
from pyro_kd.metrics import Estimate

Summary = Mapping[str, Mapping[str, Estimate]]


def save_results(out: Path, settings: Any, summary: Summary, runs: list[dict[str, Any]], begin: float) -> dict[str, Any]:
    """Write results.json into a folder, and return what it holds. ``begin``: ``time.perf_counter()`` at the start."""
    results = {
        "settings": asdict(settings),
        "summary": {model: {key: asdict(value) for key, value in row.items()} for model, row in summary.items()},
        "runs": runs,
        "wall_seconds": time.perf_counter() - begin,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "pyro_kd": pyro_kd.__version__,
        },
        "threads": torch.get_num_threads(),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    return results


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of right-aligned columns; the first row is the head, underlined."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
