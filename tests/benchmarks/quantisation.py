"""The figures of docs/export.md for a student in int8: how far its draws are from those in float32, on the same noise.

    python -m tests.benchmarks.quantisation

A VAE is trained for some seconds on the digits of scikit-learn, exported to ONNX, and quantised by ONNX Runtime's own tools, which are
calibrated on noise. It needs the extra ``export``.
"""

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from sklearn.datasets import load_digits

from models.vae import VAE
from pyro_kd.export import Exported, draw_noise, export_sampler

CALIBRATION, ROWS = 16, 2000


def trained() -> VAE:
    """A VAE of binarised digits of 8 by 8 pixels, whose latent has 8 dimensions."""
    pyro.set_rng_seed(0)
    x = torch.tensor(load_digits().images / 16, dtype=torch.float32).flatten(1).round()
    vae = VAE(64, 8, [128, 128])
    svi = SVI(vae.model, vae.guide, Adam({"lr": 2e-3}), Trace_ELBO())
    for _ in range(60):
        for batch in x[torch.randperm(len(x))].split(128):
            svi.step(len(batch), batch)
    return vae


def quantised(sampler: Exported, folder: Path) -> Any:
    """Two files, as docs/export.md has it: the one in float32, and the one in int8."""
    import onnxruntime.quantization as quantization

    class Noise(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            rng = np.random.default_rng(0)
            self.batches = iter([draw_noise(sampler.description, 64, rng) for _ in range(CALIBRATION)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    full, prepared, small = (folder / name for name in ("student.onnx", "prepared.onnx", "student.int8.onnx"))
    sampler.save(full)
    quantization.quant_pre_process(str(full), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_static(str(prepared), str(small), Noise(), per_channel=True)
    return full, small


def measured(path: Path, noise: Any) -> tuple[Any, float]:
    """The draws of a file, and the least milliseconds that they take on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session, best = onnxruntime.InferenceSession(str(path), options), float("inf")
    for _ in range(10):
        started = time.perf_counter()
        found = session.run(["x"], noise)[0]
        best = min(best, time.perf_counter() - started)
    return found, 1e3 * best


def report() -> str:
    """What the page says."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = export_sampler(trained().model, 64, targets=["x"])
        full, small = quantised(sampler, Path(name))
        noise, other = (draw_noise(sampler.description, ROWS, np.random.default_rng(seed)) for seed in (1, 2))
        (x, full_ms), (y, small_ms), (z, _) = measured(full, noise), measured(small, noise), measured(full, other)
        distances, independent = ((x - y) ** 2).sum(1), ((x - z) ** 2).sum(1)
        error = distances.std() / len(x) ** 0.5
        return (
            f"bytes: {full.stat().st_size:,} in float32, {small.stat().st_size:,} in int8\n"
            f"bits that differ on the same noise: {100 * (x != y).mean():.2f} %\n"
            f"paired squared distance a row: {distances.mean():.3f} +- {error:.3f}, of independent draws {independent.mean():.2f}\n"
            f"largest difference of the mean of a pixel: {np.abs(x.mean(0) - y.mean(0)).max():.4f}\n"
            f"{len(x)} rows on one thread: {full_ms:.1f} ms in float32, {small_ms:.1f} ms in int8"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(report())
