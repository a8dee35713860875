"""How the time of an eager step grows with the number of sites and of particles, and what the handlers cost per pair of sites.

    python -m tests.benchmarks.scaling
    python -m tests.benchmarks.scaling --sites 10 100 1000 --json scaling.json

The programs are chains of small Normal latents with a target at the end, z_1 -> z_2 -> ... -> z_n -> y, of 8 rows and 4 dimensions,
with three parameters that all links share: what they compute is next to nothing, so that what is measured are handlers. One link is one
pair of sites. Times are medians.

A step is loss and backward. The overhead of the library's handlers per pair is, with gradients and without backward,

    (the library's loss) - (Pyro's traces of the two programs) - (the divergences by formulas)

divided by pairs. The second is ``poutine.trace(teacher)`` under no_grad and ``poutine.trace(student)``, in which both programs draw their
own values; the third the KLs of all pairs of the traces by a bare formula, each summed, and their sum. What remains is recording,
replaying and giving of values, pairing and checking of sites, the dispatch of each divergence beyond its formula, and the check that the
loss is finite; the student's own drawing, which the library spares, is subtracted with the rest.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_kd import freeze
from tests.benchmarks.step_time import machine, run_for
from tests.support.losses import SurrogateKD

__all__ = ["Chain", "exponent"]

ROWS, DIMENSIONS = 8, 4


class Chain(nn.Module):
    """z_1 ~ N(0, 1), z_i ~ N(tanh(a z_{i-1} + b), s), and y ~ N(z_n, 1).

    Args:
        links: number of latents.
        slope: a at first.
    """

    def __init__(self, links: int, slope: float) -> None:
        super().__init__()
        self.links = links
        self.slope = nn.Parameter(torch.tensor(slope))
        self.shift = nn.Parameter(torch.zeros(DIMENSIONS))
        self.log_scale = nn.Parameter(torch.zeros(DIMENSIONS))

    def model(self, rows: int) -> None:
        """Sites ``z1``, ..., and ``y``, in the plate ``rows``."""
        pyro.module("chain", self)
        loc, scale = torch.zeros_like(self.shift), self.log_scale.exp()
        with pyro.plate("rows", rows):
            for i in range(1, self.links + 1):
                z = pyro.sample(f"z{i}", dist.Normal(loc, scale).to_event(1))
                loc = (self.slope * z + self.shift).tanh()
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1))


class Pair:
    """A frozen teacher and a student of so many sites each, with the parts whose times are compared."""

    def __init__(self, sites: int, particles: int = 1, vectorised: bool = False, device: str = "cpu") -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.teacher = freeze(Chain(sites - 1, 0.9).to(device).model)
        self.student = Chain(sites - 1, 0.8).to(device)
        loss = SurrogateKD(
            ["y"],
            num_particles=particles,
            vectorize_particles=vectorised,
            max_plate_nesting=1 if vectorised else math.inf,
        )
        self.loss = loss(self.student.model, self.teacher)

    def step(self) -> None:
        """Loss and backward."""
        self.student.zero_grad()
        self.loss(ROWS).backward()

    def library(self) -> Tensor:
        """The loss alone."""
        value: Tensor = self.loss(ROWS)
        return value

    def traces(self) -> tuple[list[Any], list[Any]]:
        """Both programs traced by Pyro: their distributions."""
        with torch.no_grad():
            p = poutine.trace(self.teacher).get_trace(ROWS)
        q = poutine.trace(self.student.model).get_trace(ROWS)
        return _distributions(p), _distributions(q)

    def formulas(self, traces: tuple[list[Any], list[Any]]) -> Tensor:
        """The sum of the KLs."""
        terms = []
        for p, q in zip(*traces, strict=True):
            ratio = (p.scale / q.scale).square()
            terms.append(0.5 * (ratio + ((p.loc - q.loc) / q.scale).square() - 1 - ratio.log()).sum())
        return torch.stack(terms).sum()


def _distributions(trace: Any) -> list[Any]:
    """Of the sites that have a term, without ``to_event``."""
    return [site["fn"].base_dist for name, site in trace.nodes.items() if site["type"] == "sample" and name != "rows"]


def timed(parts: Sequence[Callable[[], object]], seconds: float, device: str) -> list[list[float]]:
    """Seconds of the parts, run in turn for about ``seconds`` together, after one run that is left out; at least three times."""
    for part in parts:
        part()
    times: list[list[float]] = [[] for _ in parts]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for part, column in zip(parts, times, strict=True):
            column.append(run_for(part, 1, device))
    return times


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The least-squares slope of log seconds over log sizes: 1 is proportional."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    return statistics.linear_regression(x, y).slope


def spread(values: Sequence[float]) -> str:
    """Median and quartiles, in ms."""
    low, middle, high = (1e3 * value for value in statistics.quantiles(values, n=4, method="inclusive"))
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", nargs="+", type=int, default=[10, 20, 50, 100, 200, 500, 1000, 2000, 5000])
    parser.add_argument("--particles", nargs="+", type=int, default=[1, 2, 5, 10, 20])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each line")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(machine(options.device))
    found: dict[str, list[dict[str, float]]] = {"sites": [], "particles": []}

    print("\nAn eager step against pairs of sites, and the parts of its forward pass")
    print(
        f"{'pairs':>6s} {'step ms':>24s} {'us / pair':>9s} | {'loss ms':>24s} {'traces ms':>24s} {'formulas ms':>24s} "
        f"{'overhead us / pair':>18s}"
    )
    for sites in options.sites:
        pair = Pair(sites, device=options.device)
        traces = pair.traces()
        parts = timed([pair.step, pair.library, pair.traces, lambda: pair.formulas(traces)], options.seconds, options.device)
        step, library, traced, formulas = (statistics.median(part) for part in parts)
        overhead = (library - traced - formulas) / sites
        found["sites"].append(
            {"pairs": sites, "step": step, "loss": library, "traces": traced, "formulas": formulas, "overhead": overhead}
        )
        columns = [spread(part) for part in parts]
        print(
            f"{sites:6d} {columns[0]:>24s} {1e6 * step / sites:9.0f} | {columns[1]:>24s} {columns[2]:>24s} {columns[3]:>24s} "
            f"{1e6 * overhead:18.0f}",
            flush=True,
        )
    if len(found["sites"]) > 1:
        print("exponent of pairs, log time over log pairs:", end="")
        for first in (0, len(found["sites"]) // 2):
            rows = found["sites"][first:]
            if len(rows) > 1:
                slope = exponent([row["pairs"] for row in rows], [row["step"] for row in rows])
                print(f" {slope:.3f} from {rows[0]['pairs']} on;", end="")
        print()

    print("\nAn eager step of 50 pairs against particles")
    print(f"{'particles':>9s} {'one by one, ms':>24s} {'vectorised, ms':>24s}")
    for particles in options.particles:
        pairs = [Pair(50, particles, vectorised, options.device) for vectorised in (False, True)]
        # One pair after the other: they share Pyro's parameter store.
        serial, vectorised = (timed([_alone(pair)], options.seconds / 2, options.device)[0] for pair in pairs)
        found["particles"].append(
            {"particles": particles, "serial": statistics.median(serial), "vectorised": statistics.median(vectorised)}
        )
        print(f"{particles:9d} {spread(serial):>24s} {spread(vectorised):>24s}", flush=True)
    if len(found["particles"]) > 1:
        counts = [row["particles"] for row in found["particles"]]
        for key in ("serial", "vectorised"):
            print(f"exponent of particles, {key}: {exponent(counts, [row[key] for row in found['particles']]):.3f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def _alone(pair: Pair) -> Callable[[], None]:
    """The step of a pair whose student is the only one in Pyro's parameter store."""
    pyro.clear_param_store()
    return pair.step


if __name__ == "__main__":
    main()
