"""Bias, variance and time of the gradients through discrete latents, on chains whose exact gradient is known by enumeration.

    python -m tests.benchmarks.discrete_gradients --seconds 20

For each gradient, over all weights of the student: the mean error of the estimates relative to the exact gradient; the largest error in units
of its standard error; the variance of one step of 256 rows, summed over the weights and relative to the squared exact gradient; CPU
milliseconds a step; and the product of the last two, in seconds, which says how long an unbiased estimate must be averaged. The chains are those
of tests/support/coupled_chains.py; "near" is a student closer to its teacher by a factor of ten, as late in training.
"""

import argparse
import time
from dataclasses import replace

import pyro
import torch
from torch import Tensor

from tests.support.coupled_chains import BINOMIALS, BITS, CATEGORIES, GEOMETRIC, LARGE_BINOMIAL, POISSON, CoupledChain

ROWS = 256
KINDS: dict[str, tuple[str, dict[str, int]]] = {
    "cut": ("cut", {}),
    "implicit": ("implicit", {}),
    "boundary": ("boundary", {}),
    "boundary_all": ("boundary_all", {}),
    "score": ("score", {}),
    "score, 4 particles": ("score", {"num_particles": 4}),
}
HEADER = "| latents | gradient | relative bias | largest z | variance | ms a step | variance x seconds |\n|---|---|---|---|---|---|---|"


def near(chain: CoupledChain) -> CoupledChain:
    """The chain with a student that is ten times closer to its teacher."""
    weights = zip(chain.student, chain.teacher, strict=True)
    return replace(chain, student=tuple(teacher + 0.1 * (student - teacher) for student, teacher in weights))


CHAINS = {
    "4 bits": BITS,
    "4 bits, near": near(BITS),
    "2 Binomial(3)": BINOMIALS,
    "2 Binomial(3), near": near(BINOMIALS),
    "Binomial(50)": LARGE_BINOMIAL,
    "Binomial(50), near": near(LARGE_BINOMIAL),
    "Poisson": POISSON,
    "Geometric": GEOMETRIC,
    "3 categories": CATEGORIES,
}


def row(title: str, chain: CoupledChain, name: str, seconds: float) -> str:
    """The line of the table for one gradient on one chain, measured for some seconds of CPU."""
    kind, options = KINDS[name]
    truth = chain.exact_gradient()
    pyro.set_rng_seed(0)
    chain.gradients(kind, number=2, rows=ROWS, **options)
    start, estimates = time.process_time(), list[Tensor]()
    while time.process_time() - start < seconds or len(estimates) < 3:
        estimates.append(chain.gradients(kind, number=20, rows=ROWS, **options))
    found = torch.cat(estimates)
    taken = (time.process_time() - start) / len(found)
    error, spread = found.mean(0) - truth, found.std(0) / len(found) ** 0.5
    is_fixed = spread < 1e-12  # always the same
    z = float("inf") if (error[is_fixed].abs() > 1e-9).any() else float((error / spread)[~is_fixed].abs().max())
    bias, variance = float(error.norm() / truth.norm()), float(found.var(0).sum() / truth.square().sum())
    return f"| {title} | {name} | {bias:.3f} | {z:.1f} | {variance:.2g} | {1e3 * taken:.1f} | {variance * taken:.2g} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of CPU for each line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    print(HEADER)
    for title, chain in CHAINS.items():
        for name, (kind, _) in KINDS.items():
            if chain is not CATEGORIES or kind != "implicit":
                print(row(title, chain, name, options.seconds), flush=True)


if __name__ == "__main__":
    main()
