"""What draws of a teacher that are kept cost and save: the time of a step, and the student after equal steps.

python -m tests.benchmarks.teacher_draws time       CPU time of a step, hierarchical VAE of width 32 to 8, 32 rows
python -m tests.benchmarks.teacher_draws quality    exact KL after 400 steps, normal chain of 3 layers, 6 seeds
"""

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro
import torch

from examples.shallow_chain import law_of
from models.chains import NormalChain, NormalStudent
from models.hierarchical_vae import HierarchicalVAE
from pyro_kd import Distiller, SurrogateKD, cache_teacher, freeze
from pyro_kd.metrics import Estimate
from pyro_kd.training.cache_files import read_draw

ROWS, STEPS, SEEDS = 32, 400, 6


def seconds(run: Callable[[], object], count: int) -> float:
    """CPU time of a call."""
    begin = time.process_time()
    for _ in range(count):
        run()
    return (time.process_time() - begin) / count


def student_of(teacher, **options):
    """A narrow VAE with its trainer, in an empty parameter store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    student = HierarchicalVAE(32, 8, channels=1)
    loss = SurrogateKD(["x"], teacher_forcing=0.0)
    return Distiller(
        student.model, teacher, lambda params: torch.optim.Adam(params, lr=1e-3), loss, log_every=10**6, **options
    )


def print_times() -> None:
    """The time of a step for each reuse, and that of reading a cache."""
    teacher = freeze(HierarchicalVAE(32, 32, channels=1).model)
    for reuse in (1, 2, 4, 8):
        distiller = student_of(teacher, reuse=reuse)
        seconds(lambda: distiller.step(ROWS), 1 + 2 * reuse)
        print(f"reuse {reuse}: {seconds(lambda: distiller.step(ROWS), max(2 * reuse, 6)):.3f} s a step", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        cache = cache_teacher(teacher, ROWS, path=Path(folder) / "cache", batches=6, targets=["x"])
        written = (time.process_time() - begin) / 6
        size = sum(file.stat().st_size for file in cache.path.iterdir()) / 6
        read, checked = seconds(lambda: read_draw(cache._header, 3), 10), seconds(lambda: cache[3], 10)
        distiller, draw = student_of(cache.teacher), cache[0]
        distiller.step(draw)
        step = seconds(lambda: distiller.step(draw), 10)
    print(f"a draw: {size / 1e6:.1f} MB, written in {written:.3f} s, read in {read:.4f} s, with its check {checked:.4f} s")
    print(f"the student's step on it: {step:.3f} s")


def exact_kl(teacher: NormalChain, student: NormalStudent) -> float:
    """KL of the laws of y, by quadrature."""
    p, q = (law_of(chain, points=2001).double() for chain in (teacher, student))
    p, q = p / p.sum(), q / q.sum()
    return float((p * (p.clamp_min(1e-300) / q.clamp_min(1e-300)).log()).sum())


def print_quality() -> None:
    """The exact KL of students after equal steps."""
    chain = NormalChain(3)
    teacher = freeze(chain.model)
    for reuse in (1, 2, 4, 8, 16, 64):
        found = []
        for seed in range(SEEDS):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            student = NormalStudent(3)
            distiller = Distiller(
                student.model,
                teacher,
                lambda params: torch.optim.Adam(params, lr=0.01),
                SurrogateKD(["y"]),
                scheduler=lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, STEPS),
                reuse=reuse,
            )
            distiller.fit(ROWS, steps=STEPS, progress=False)
            found.append(exact_kl(chain, student))
        kl = Estimate.of(torch.tensor(found, dtype=torch.float64))
        print(f"reuse {reuse}: KL {kl.mean:.5f} +- {kl.standard_error:.5f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    {"time": print_times, "quality": print_quality}[sys.argv[1]]()
