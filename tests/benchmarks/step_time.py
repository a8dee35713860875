"""Time and memory of one training step of each application: the library against a loop written by hand.

    python -m tests.benchmarks.step_time
    python -m tests.benchmarks.step_time --applications helmholtz vrnn --rows 8 --length 100 --seconds 60 --json times.json

A step is loss, backward, Adam and zero_grad. Its variants:

- ``by hand``: plain PyTorch for this one model, see ``tests/benchmarks/applications``;
- ``traces``: one trace of each program by Pyro, and their KLs by hand, without shared noise: what Pyro alone costs;
- ``library``: the loss of the library, which runs Pyro's handlers in each step;
- ``graph``: the same after ``compile(backend=None)``: the captured operations, one by one;
- ``captured``: the same after ``compile()``, that is compiled by inductor, where the graph is not too long;
- ``SVI``: Pyro's own ``SVI.step`` with ``Trace_ELBO`` on the student's model and guide. Another loss: for scale.

Each trains networks of its own, from the same weights, with the same optimiser. They alternate in one process, in blocks of steps, in
turned order from round to round. Printed are the median step time of the blocks and its quartiles, and the median and quartiles of the
ratio to the block by hand of the same round.

Memory is the peak of what tensors hold during one step beyond what they held before it: activations, gradients and temporaries,
neither parameters nor Adam's state. On a CPU it is summed from the allocations that torch's profiler sees, in code compiled by
torch.compile too; work space inside oneDNN or MKL is not among them. On a CUDA device it is torch.cuda.max_memory_allocated.

``first`` is the time of the first step, which for ``graph`` and ``captured`` includes the capture, and ``paid`` the number of steps after which that
time is won back against ``library``.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.applications import APPLICATIONS, Application

__all__ = ["VARIANTS", "Timing", "measure"]

Step = Callable[[], object]

REDUCED = {"helmholtz": 272, "hierarchical_vae": 64, "continual": 32, "vrnn": 8, "chain": 256}
"""Rows of a batch where ``--rows`` does not say: for two cores."""


def step_of(application: Application, loss: Callable[[], Tensor]) -> Step:
    """A training step with this loss."""
    params = list(application.student.parameters())
    optim = torch.optim.Adam(params, lr=application.learning_rate, weight_decay=application.weight_decay)

    def step() -> None:
        loss().backward()
        optim.step()
        optim.zero_grad()  # last, as in SVI, so that no step starts with gradients in memory

    return step


def svi_step(application: Application) -> Step:
    """A step of Pyro's SVI on the student's model and guide."""
    settings = {"lr": application.learning_rate, "weight_decay": application.weight_decay}
    svi = SVI(application.model, application.guide, PyroOptim(torch.optim.Adam, settings), loss=Trace_ELBO())
    return lambda: svi.step(*application.args)


VARIANTS: dict[str, Callable[[Application], Step | None]] = {
    "by hand": lambda application: step_of(application, application.by_hand),
    "traces": lambda application: step_of(application, application.by_traces) if application.by_traces else None,
    "formulas": lambda application: step_of(application, application.by_formulas) if application.by_formulas else None,
    "library": lambda application: step_of(application, application.library),
    "graph": lambda application: step_of(application, application.captured(backend=None)),
    "captured": lambda application: step_of(application, application.captured()),
    "SVI": svi_step,
}


@dataclass
class Timing:
    """What was measured of one variant; ``seconds`` and ``ratios`` have one entry a block.

    Attributes:
        variant: its name.
        first: seconds of the first step.
        peak: bytes beyond the level before a step.
        seconds: of a step.
        ratios: of a step to one by hand.
    """

    variant: str
    first: float = 0.0
    peak: int = 0
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """Of a step to one by hand."""
        return statistics.median(self.ratios)


def measure(
    build: Callable[[], Application],
    variants: Collection[str] = tuple(VARIANTS),
    *,
    seconds: float = 20.0,
    memory: bool = True,
    blocks: int = 25,
    device: str = "cpu",
) -> list[Timing]:
    """Measure the variants of an application, in alternating blocks.

    Args:
        build: makes the application; called once for each variant, after the same seed.
        variants: names of VARIANTS.
        seconds: how long to run blocks, after the first steps; at least three rounds.
        memory: whether to measure it.
        blocks: rounds to divide the time into.
        device: that the networks are on.
    """
    timings, steps, expected = [], dict[str, Step](), dict[str, float]()
    for name in variants:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        step = VARIANTS[name](build())
        if step is None:
            continue
        timings.append(timing := Timing(name))
        timing.first = run_for(step, 1, device)
        expected[name] = warm(step, device)
        if memory:
            timing.peak = peak_bytes(step, device)
        steps[name] = step
    alternate(steps, expected, timings, seconds, blocks, device)
    return timings


def alternate(
    steps: Mapping[str, Step],
    expected: Mapping[str, float],
    timings: Sequence[Any],
    seconds: float,
    blocks: int,
    device: str,
) -> None:
    """Run blocks of the steps, forwards and backwards in turn, at least three rounds.

    Args:
        steps: by variant.
        expected: seconds of each.
        timings: get the ``seconds`` of a step of their ``variant`` and its ``ratios`` to the one by hand, an entry a block.
        seconds: how long.
        blocks: rounds to divide the time into.
        device: that the networks are on.
    """
    counts = {name: max(1, round(seconds / blocks / len(steps) / expected[name])) for name in steps}
    stores: dict[str, dict[str, Any]] = {name: {} for name in steps}
    end, rounds = time.perf_counter() + seconds, 0
    while steps and (time.perf_counter() < end or rounds < 3):
        order = list(steps)[:: 1 if rounds % 2 else -1]
        times = {name: block(steps[name], counts[name], device, stores[name]) for name in order}
        for timing in timings:
            if timing.variant in times:
                timing.seconds.append(times[timing.variant])
                if "by hand" in times:
                    timing.ratios.append(times[timing.variant] / times["by hand"])
        rounds += 1


def block(step: Step, count: int, device: str, store: dict[str, Any]) -> float:
    """Mean seconds of the steps of a block.

    Args:
        step: the step.
        count: how many.
        device: that the networks are on.
        store: what the variant has registered with Pyro: empty before its first block. In one store for all variants, ``pyro.module``
            would give a student the tensors of another's; and a captured step that finds the store empty registers everything anew, for
            as long as an eager step takes.
    """
    is_new = not store
    if is_new:
        store.update(params={}, constraints={})
    with pyro.get_param_store().scope(store):
        if is_new:
            step()
        return run_for(step, count, device)


def warm(step: Step, device: str) -> float:
    """Seconds of a step, the least of a few after the first: at least two, up to half a second of them."""
    times = [run_for(step, 1, device)]
    while len(times) < 2 or sum(times) < 0.5:
        times.append(run_for(step, 1, device))
    return min(times)


def run_for(step: Step, count: int, device: str) -> float:
    """Mean seconds of ``count`` steps."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronise(device)
    return (time.perf_counter() - start) / count


def synchronise(device: str) -> None:
    """Wait for a CUDA device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(step: Step, device: str) -> int:
    """The peak of tensors' memory in one step, beyond the level before it."""
    if torch.device(device).type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def report(application: str, timings: Sequence[Timing]) -> str:
    """The table of an application."""
    by_name = {timing.variant: timing for timing in timings}
    hand, library = by_name.get("by hand"), by_name.get("library")
    lines = [
        f"{'':10s} {'ms per step':>25s} {'/ by hand':>20s} {'peak MiB':>9s} {'/ by hand':>9s} {'first s':>8s} {'paid':>7s}"
    ]
    for timing in timings:
        ms, ratio = spread([1e3 * x for x in timing.seconds], 2), spread(timing.ratios, 3)
        memory = f"{timing.peak / hand.peak:9.2f}" if hand and hand.peak else ""
        line = f"{timing.variant:10s} {ms:>25s} {ratio:>20s} {timing.peak / 2**20:9.3g} {memory:>9s} {timing.first:8.2f}"
        if timing.variant in ("graph", "captured") and library:
            won = library.median - timing.median
            line += f" {round(timing.first / won):7d}" if won > 0 else f" {'never':>7s}"
        lines.append(line)
    blocks = max((len(timing.seconds) for timing in timings), default=0)
    return f"{application}; {blocks} blocks\n" + "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Median and quartiles."""
    if len(values) < 2:
        return ""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def machine(device: str) -> str:
    """Processor, threads and version of torch."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    if models:
        name = models[0].partition(":")[2].strip()
    if torch.device(device).type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {name}"
    return f"{name}; {torch.get_num_threads()} threads; torch {torch.__version__}, Pyro {pyro.__version__}"


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--applications", nargs="+", choices=APPLICATIONS, default=list(APPLICATIONS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=20.0, help="of each application, after the first steps")
    parser.add_argument("--rows", type=int, help=f"of a batch; without it {REDUCED}")
    parser.add_argument("--length", type=int, default=628, help="points of the VRNN's drawings")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(machine(options.device))
    found = {}
    for name in options.applications:
        sizes = {"rows": options.rows or REDUCED[name], "device": options.device}
        if name == "vrnn":
            sizes["length"] = options.length
        built: list[str] = []

        def build(name: str = name, sizes: dict[str, object] = sizes, built: list[str] = built) -> Application:
            application = APPLICATIONS[name](**sizes)
            built.append(application.sizes)
            return application

        timings = measure(build, options.variants, seconds=options.seconds, device=options.device)
        print("\n" + report(f"{name}: {built[0]}", timings), flush=True)
        found[name] = {"sizes": built[0], "variants": [asdict(timing) for timing in timings]}
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(options.device), "applications": found}, indent=1))


if __name__ == "__main__":
    main()
