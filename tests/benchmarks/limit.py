"""How far a captured step is from what the processor allows: the time of its convolutions and matrix products alone.

    python -m tests.benchmarks.limit
    python -m tests.benchmarks.limit --applications hierarchical_vae --seconds 30

A step is loss and backward, by the library, captured by ``compile()``. Of each application:

- ``GFLOP``: what the convolutions and products of a step come to, counted by torch (:mod:`torch.utils.flop_counter`) in an eager step; those
  that the captured step merges or leaves out are in it;
- ``at the peak``: the milliseconds in which this machine does so many operations at its peak, the rate of the fastest product of square
  matrices in float32: the physical limit;
- ``alone``: the milliseconds that the kernels of convolutions and products take in the captured step, by torch's profiler. Above
  the limit, since no kernel reaches the peak with the shapes that the networks have; "-" where it is not, because a graph merges products, or
  because compiled code calls them out of the profiler's sight;
- ``captured``: a captured step, the median; and its ratios to the two.

So ``alone / at the peak`` is what shapes cost, and ``captured / alone`` what everything else does: element-wise operations, random numbers,
norms and Python.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import pyro
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.applications import APPLICATIONS
from tests.benchmarks.growth import step_of
from tests.benchmarks.step_time import REDUCED, Step, machine, run_for, warm

__all__ = ["Limit", "is_product", "measure", "peak_rate"]

_PRODUCT = re.compile(r"conv|addmm|baddbmm|\bbmm\b|\bmm\b|linear|addmv|gemm")


@dataclass
class Limit:
    """What was measured of an application.

    Attributes:
        name, sizes: of the application.
        operations: of the convolutions and products of a step.
        at_the_peak: seconds that they take at the peak.
        alone: seconds that they take in the captured step.
        captured: seconds of that step.
        largest: the other operations of the captured step that take most, with their seconds.
    """

    name: str
    sizes: str
    operations: int
    at_the_peak: float
    alone: float
    captured: float
    largest: dict[str, float]


def is_product(kernel: str) -> bool:
    """Whether an operation, by its name in a profile, is a convolution or a matrix product, forward or backward."""
    return bool(_PRODUCT.search(kernel))


def peak_rate(sizes: Sequence[int] = (512, 1024, 2048, 4096), repeats: int = 5) -> float:
    """Operations a second in the fastest product of square matrices in float32, a multiplication and an addition being two."""
    rates = []
    for size in sizes:
        x, y = torch.randn(size, size), torch.randn(size, size)
        x @ y
        for _ in range(repeats):
            start = time.perf_counter()
            x @ y
            rates.append(2 * size**3 / (time.perf_counter() - start))
    return max(rates)


def count(step: Step) -> int:
    """The operations of the convolutions and products of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def split(step: Step, steps: int) -> tuple[float, dict[str, float]]:
    """Seconds a step in convolutions and products, and in the other operations that take most, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    products, others = 0.0, dict[str, float]()
    for event in profiler.key_averages():
        seconds = event.self_cpu_time_total / 1e6 / steps
        if is_product(event.key):
            products += seconds
        else:
            others[event.key] = seconds
    return products, dict(sorted(others.items(), key=lambda item: -item[1])[:4])


def measure(name: str, sizes: dict[str, int], rate: float, seconds: float) -> Limit:
    """Measure an application of these sizes against a rate."""

    def built(capture: bool) -> tuple[str, Step]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        application = APPLICATIONS[name](**sizes)
        loss: Callable[[], Tensor] = application.captured() if capture else application.library
        step = step_of(application.student, loss)
        step()
        return application.sizes, step

    words, eager = built(False)
    operations = count(eager)
    _, step = built(True)
    each = warm(step, "cpu")
    alone, largest = split(step, max(3, round(1 / each)))
    times = [run_for(step, 1, "cpu") for _ in range(max(5, round(seconds / each)))]
    return Limit(name, words, operations, operations / rate, alone, median(times), largest)


def table(limits: Sequence[Limit]) -> str:
    """In Markdown."""
    rows = [
        "| | GFLOP | at the peak, ms | alone, ms | captured, ms | captured / at the peak | captured / alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in limits:
        is_seen = found.alone >= found.at_the_peak
        words = [
            f"{found.operations / 1e9:.3g}",
            f"{1e3 * found.at_the_peak:,.3g}",
            f"{1e3 * found.alone:,.3g}" if is_seen else "-",
            f"{1e3 * found.captured:,.3g}",
            f"{found.captured / found.at_the_peak:,.3g}",
            f"{found.captured / found.alone:,.3g}" if is_seen else "-",
        ]
        rows.append(f"| {found.name}: {found.sizes} | {' | '.join(words)} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--applications", nargs="+", choices=APPLICATIONS, default=list(APPLICATIONS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of each application, after the capture")
    parser.add_argument("--rows", type=int, help=f"of a batch; without it {REDUCED}")
    parser.add_argument("--length", type=int, default=100, help="points of the VRNN's drawings")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    rate = peak_rate()
    print(f"{machine('cpu')}; peak {rate / 1e9:.0f} GFLOP/s\n")
    limits = []
    for name in options.applications:
        sizes = {"rows": options.rows or REDUCED[name]} | ({"length": options.length} if name == "vrnn" else {})
        limits.append(found := measure(name, sizes, rate, options.seconds))
        others = ", ".join(f"{kernel} {1e3 * seconds:.3g} ms" for kernel, seconds in found.largest.items())
        print(
            f"{name}: captured {1e3 * found.captured:.1f} ms, products alone {1e3 * found.alone:.1f} ms; then {others}",
            flush=True,
        )
    print("\n" + table(limits))
    if options.json:
        options.json.write_text(json.dumps([asdict(found) for found in limits], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
