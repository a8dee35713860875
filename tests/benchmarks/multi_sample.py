"""CPU time of a training step of the K-sample bound, against that of the surrogate loss on the same programs.

    python -m tests.benchmarks.multi_sample --samples 64 --seconds 20

A step is loss, backward, Adam and zero_grad, eager and captured. CPU time is measured, in turned order, so that other work on the
machine matters little. Programs: the two chains of 10 layers and the Helmholtz machine with the target y1, whose rows serve each
other as samples; and the Helmholtz machine with both targets, which takes K runs in an outer plate, since z2 depends on y2.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pyro
import torch

from models.chains import BinomialChain, BinomialStudent, NormalChain, NormalStudent
from models.helmholtz import HelmholtzMachine
from pyro_kd import MultiSampleKD, freeze
from tests.support.losses import SurrogateKD

__all__ = ["PROGRAMS", "ratios"]

PROGRAMS = {
    "normal chain": (lambda: (NormalStudent(10), NormalChain(10)), ["y"], 256),
    "binomial chain": (lambda: (BinomialStudent(10), BinomialChain(10)), ["y"], 256),
    "helmholtz, y1": (lambda: (HelmholtzMachine(2), HelmholtzMachine(8)), ["y1"], 272),
    "helmholtz, both": (lambda: (HelmholtzMachine(2), HelmholtzMachine(8)), ["y2", "y1"], 272),
}
"""Student and teacher, targets, and rows of a batch."""


def ratios(name: str, samples: int, seconds: float) -> dict[str, float]:
    """Milliseconds of a step of each loss, eager and captured.

    Args:
        name: one of PROGRAMS.
        samples: the number K.
        seconds: how long to run.
    """
    build, targets, rows = PROGRAMS[name]
    steps: dict[str, Callable[[], None]] = {}
    for how in ("eager", "captured"):
        for what in ("surrogate", "K samples"):
            pyro.clear_param_store()
            student, teacher = build()
            loss = (
                MultiSampleKD(targets, num_samples=samples)
                if what == "K samples"
                else SurrogateKD(targets, latent_weight=1.0)
            )
            module = loss(student.model, freeze(teacher.model))
            if how == "captured":
                module.compile()
            steps[f"{what}, {how}"] = step_of(module, torch.optim.Adam(student.parameters(), lr=1e-3), rows)
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    for round_ in range(10**6):
        for key in list(steps)[:: 1 if round_ % 2 else -1]:
            pyro.clear_param_store()
            steps[key]()
            start = time.process_time()
            for _ in range(5):
                steps[key]()
            times[key].append((time.process_time() - start) / 5 * 1e3)
        if time.perf_counter() > end and round_ >= 3:
            break
    return {key: statistics.median(values[1:]) for key, values in times.items()}


def step_of(module: Callable[[int], torch.Tensor], optimiser: torch.optim.Optimizer, rows: int) -> Callable[[], None]:
    """A training step."""

    def step() -> None:
        (module(rows) / rows).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each pair of programs, after the first steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.programs:
        found = ratios(name, options.samples, options.seconds)
        line = "; ".join(
            f"{how}: {found[f'K samples, {how}']:.2f} ms against {found[f'surrogate, {how}']:.2f}, "
            f"ratio {found[f'K samples, {how}'] / found[f'surrogate, {how}']:.2f}"
            for how in ("eager", "captured")
        )
        print(f"{name}, K = {options.samples}: {line}", flush=True)


if __name__ == "__main__":
    main()
