"""Which kernels a training step runs on a GPU, and how much of its time they take.

    python -m tests.benchmarks.gpu_profile --application vrnn --rows 32 --length 100

The variants and the step are those of ``tests/benchmarks/gpu.py``. The time of the kernels is the least that a step can take as long as
it runs one kernel after the other; what is beyond it is spent waiting for Python.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

import pyro
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.applications import APPLICATIONS
from tests.benchmarks.gpu import VARIANTS, step_of
from tests.benchmarks.step_time import Step, machine, run_for

__all__ = ["kernels_of", "report"]

UNROLLED = ("by hand", "library", "as it is", "cudagraphs")
"""What is profiled if nothing is said."""


def kernels_of(step: Step, device: str) -> dict[str, tuple[int, float]]:
    """How often each kernel runs in a step, and the seconds of all its runs. Empty on a CPU."""
    if torch.device(device).type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run_for(step, 1, device)
    found: defaultdict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CUDA:
            found[event.name].append(event.time_range.elapsed_us() / 1e6)
    return {name: (len(times), sum(times)) for name, times in found.items()}


def report(variant: str, first: float, seconds: float, kernels: dict[str, tuple[int, float]], largest: int = 5) -> str:
    """A line for the step and one for each of the kernels that take most."""
    number, busy = sum(n for n, _ in kernels.values()), sum(s for _, s in kernels.values())
    lines = [f"{variant}: first {first:.2f} s, then {1e3 * seconds:.1f} ms; {number:,} kernels, {1e3 * busy:.1f} ms"]
    for name, (times, total) in sorted(kernels.items(), key=lambda item: -item[1][1])[:largest]:
        lines.append(f"    {1e3 * total:8.2f} ms, {times:6d} times  {name:.90}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Profile, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--application", choices=APPLICATIONS, default="vrnn")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(UNROLLED))
    parser.add_argument("--rows", type=int, default=32, help="of a batch")
    parser.add_argument("--length", type=int, help="points of the VRNN's drawings")
    parser.add_argument("--steps", type=int, default=10, help="whose median time is printed")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing was profiled")
        return
    sizes: dict[str, Any] = {"rows": options.rows} | ({"length": options.length} if options.length else {})
    print(machine(options.device))
    for name in options.variants:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        application = APPLICATIONS[options.application](**sizes, device=options.device)
        step = step_of(application, VARIANTS[name], options.device)
        first = run_for(step, 1, options.device)
        seconds = median(run_for(step, 1, options.device) for _ in range(options.steps))
        print(report(name, first, seconds, kernels_of(step, options.device)), flush=True)


if __name__ == "__main__":
    main()
