"""Time of one training step of each objective, as a ratio to a step of the surrogate loss on the same programs.

    python -m tests.benchmarks.objectives
    python -m tests.benchmarks.objectives --programs chain --seconds 30 --json objectives.json

A step is loss, backward, Adam and zero_grad. The objectives alternate in one process, in blocks of steps; printed are the median time of a
step, and the median and quartiles of the ratio to the block of the surrogate loss in the same round. Each trains a student of its own from the
same weights. ``captured`` runs the compiled loss, after its first steps.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch

from models.chains import BinomialChain, BinomialStudent, NormalChain, NormalStudent
from models.helmholtz import HelmholtzMachine
from pyro_kd import LocalKD, freeze
from pyro_kd.losses import DistillationLoss
from tests.benchmarks.step_time import block, machine, warm
from tests.support.losses import SurrogateKD

__all__ = ["OBJECTIVES", "PROGRAMS", "Cost", "costs"]


class Programs(NamedTuple):
    """A teacher, its student, the rows of a batch, and the targets."""

    teacher: Callable[..., Any]
    student: torch.nn.Module
    rows: int
    targets: list[str]


def _helmholtz() -> Programs:
    student = HelmholtzMachine(width=2)
    return Programs(freeze(HelmholtzMachine(width=8).model), student, 272, ["y1", "y2"])


PROGRAMS: dict[str, Callable[[], Programs]] = {
    "helmholtz": _helmholtz,
    "chain": lambda: Programs(freeze(NormalChain(10).model), NormalStudent(10), 256, ["y"]),
    "counts": lambda: Programs(freeze(BinomialChain(10).model), BinomialStudent(10), 256, ["y"]),
}

OBJECTIVES: dict[str, Callable[[list[str]], DistillationLoss]] = {
    "surrogate": SurrogateKD,
    "local": LocalKD,
    "teacher forcing": lambda targets: SurrogateKD(targets, teacher_forcing=0.5),
}


class Cost(NamedTuple):
    """What was measured of one objective.

    Attributes:
        objective: its name.
        seconds: median of a step.
        ratios: of a step to one of the surrogate loss, for each round.
    """

    objective: str
    seconds: float
    ratios: list[float]


def costs(program: str, *, captured: bool = False, seconds: float = 10.0, blocks: int = 15) -> list[Cost]:
    """Measure all objectives on one pair of programs, in alternating blocks.

    Args:
        program: a name of PROGRAMS.
        captured: whether to compile the losses.
        seconds: how long to measure, after the first steps.
        blocks: rounds to divide the time into.
    """
    if (
        captured
    ):  # every call of a function that torch.compile has compiled after the first one pays for a look-up: let all pay
        torch.compile(torch.sin)(torch.zeros(1))
    steps = {name: _step(program, objective, captured) for name, objective in OBJECTIVES.items()}
    each = {name: warm(step, "cpu") for name, step in steps.items()}
    times: Mapping[str, list[float]] = {name: [] for name in steps}
    stores: dict[str, dict[str, Any]] = {name: {} for name in steps}
    for round_ in range(blocks):
        for name in list(steps)[:: 1 if round_ % 2 else -1]:
            count = max(round(seconds / blocks / len(steps) / each[name]), 1)
            times[name].append(block(steps[name], count, "cpu", stores[name]))
    base = times["surrogate"]
    return [
        Cost(name, statistics.median(found), [mine / theirs for mine, theirs in zip(found, base, strict=True)])
        for name, found in times.items()
    ]


def _step(program: str, objective: Callable[[list[str]], DistillationLoss], captured: bool) -> Callable[[], object]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    programs = PROGRAMS[program]()
    loss = objective(programs.targets)
    if captured:
        loss.compile()
    optim = torch.optim.Adam(programs.student.parameters(), lr=1e-3)

    def step() -> None:
        loss.differentiable_loss(programs.student.model, programs.teacher, programs.rows).backward()
        optim.step()
        optim.zero_grad()

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each table of a pair of programs")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--eager", action="store_true", help="leave the captured steps out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(machine("cpu"))
    found = {}
    for program in options.programs:
        for captured in (False,) if options.eager else (False, True):
            name = f"{program}, {'captured' if captured else 'eager'}"
            found[name] = costs(program, captured=captured, seconds=options.seconds)
            print(f"\n{name}")
            for cost in found[name]:
                low, middle, high = statistics.quantiles(cost.ratios, n=4)
                print(
                    f"  {cost.objective:18} {1000 * cost.seconds:8.2f} ms   x{middle:.2f} [{low:.2f}, {high:.2f}]",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps({name: [cost._asdict() for cost in rows] for name, rows in found.items()}))


if __name__ == "__main__":
    main()
