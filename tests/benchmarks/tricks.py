"""What each trick in the eager step is worth: a step without it, as a ratio to a step with all of them.

    python -m tests.benchmarks.tricks --seconds 60

The steps alternate in one process: loss, backward and Adam. A trick stays only if its gain is worth what it costs to understand.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import torch

from pyro_kd.losses import stacking
from pyro_kd.losses.validation import ValidationSchedule
from pyro_kd.noise.samplers import DIRECT
from tests.benchmarks.applications import APPLICATIONS
from tests.benchmarks.scaling import Pair
from tests.benchmarks.step_time import machine, run_for, spread, step_of

ROWS = {"helmholtz": 272, "hierarchical_vae": 8, "continual": 32, "vrnn": 16, "chain": 256}


@contextlib.contextmanager
def without_direct_samplers() -> Iterator[None]:
    """Run every family on the noise tape."""
    kept = dict(DIRECT)
    DIRECT.clear()
    try:
        yield
    finally:
        DIRECT.update(kept)


def without_stacking() -> Any:
    """Compute the divergence of each site by itself."""
    return mock.patch.object(stacking, "_LEAST_SITES", 10**9)


def validating_every_call() -> Any:
    """Leave Pyro's and torch's validation on in every call."""
    return mock.patch.object(ValidationSchedule, "of_call", return_value=contextlib.nullcontext())


TRICKS: dict[str, Callable[[], Any]] = {
    "with all": contextlib.nullcontext,
    "without direct samplers": without_direct_samplers,
    "without stacking": without_stacking,
    "validating every call": validating_every_call,
}


def steps(rows: dict[str, int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The applications, and a chain of 50 sites, each as a name and a step."""
    for name, build in APPLICATIONS.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        application = build(rows=rows[name], **({"length": 50} if name == "vrnn" else {}))
        yield f"{name}, {application.sizes}", step_of(application, application.library)
    yield "chain of 50 sites", Pair(50).step


def measure(step: Callable[[], Any], seconds: float) -> dict[str, list[float]]:
    """Seconds of a step under each entry of TRICKS, one per round."""
    times: dict[str, list[float]] = {name: [] for name in TRICKS}
    for _ in range(3):
        step()
    count = max(1, round(0.1 / run_for(step, 1, "cpu")))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["with all"]) < 3:
        for name, trick in TRICKS.items():
            with trick():
                step()
                times[name].append(run_for(step, count, "cpu"))
    return times


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each application")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine("cpu"))
    found = {}
    for title, step in steps(ROWS):
        times = measure(step, options.seconds)
        found[title] = times
        print(f"\n{title}: {1e3 * statistics.median(times['with all']):.2f} ms per step, {len(times['with all'])} rounds")
        for name in [name for name in TRICKS if name != "with all"]:
            ratios = [one / base for one, base in zip(times[name], times["with all"], strict=True)]
            print(f"  {name:26s} x {spread(ratios, 3)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
