"""The figures of docs/export.md for a program with counts: ONNX Runtime against Pyro, on one thread.

    python -m tests.benchmarks.exported_counts

It needs the extra ``export``, and takes a minute.
"""

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro import poutine

from models.chains import BinomialChain
from pyro_kd.export import draw_noise, export_sampler, load_onnx


def milliseconds(run: Callable[[], Any], seconds: float = 0.5) -> float:
    """The least time that a run takes."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return 1e3 * best


def report() -> str:
    """The table."""
    model, lines = BinomialChain(2).model, ["| rows | ONNX Runtime | Pyro, eager |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        path = Path(name) / "chain.onnx"
        export_sampler(model, 6, targets=["y"], path=path)
        sampler = load_onnx(path)
        for rows in (6, 64, 1000, 10_000):
            noise = draw_noise(sampler.description, rows, np.random.default_rng(0))
            one = milliseconds(lambda noise=noise: sampler(noise))  # type: ignore[misc]
            two = milliseconds(lambda rows=rows: poutine.trace(model).get_trace(rows))  # type: ignore[misc]
            lines.append(f"| {rows:,} | {one:.2f} ms | {two:.2f} ms |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(report())
