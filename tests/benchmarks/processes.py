"""What a step of two processes costs beyond one of a single process with the same rows in each.

    python -m tests.benchmarks.processes
    python -m tests.benchmarks.processes --steps 20 --rounds 3 --applications helmholtz

The measure is processor time of a process, which does not depend on what else the machine does; torch's own threads for communication
are in it. Each round measures one process and two, in turn; the table has medians over rounds, with the smallest and the largest.
``sums`` is the time of adding up gradients alone. ``DDP`` is the ratio of a loop of a few lines around torch's own DistributedDataParallel.
"""

import argparse
import statistics
import time
from typing import Any

import pyro
import torch
from torch.nn.parallel import DistributedDataParallel

from models.helmholtz import HelmholtzMachine
from models.hierarchical_vae import HierarchicalVAE
from pyro_kd import Distiller, SurrogateKD, freeze
from pyro_kd.training.processes.group import Group
from tests.support.processes import Failure, in_processes

PROGRAMS = {
    "helmholtz": (lambda: (HelmholtzMachine(width=2), HelmholtzMachine(width=8)), ["y1", "y2"], 272),
    "hierarchical_vae": (lambda: (HierarchicalVAE(32, 16), HierarchicalVAE(32, 32)), ["x"], 8),
}
"""Student and teacher, the targets, and the rows of a process."""


def seconds_of_steps(name: str, steps: int) -> tuple[float, float]:
    """Processor time of a step in this process, and of adding up gradients in it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    make, targets, rows = PROGRAMS[name]
    student, teacher = make()
    loss = SurrogateKD(targets, teacher_forcing=0.0)
    distiller = Distiller(student.model, freeze(teacher.model), _adam, loss, log_every=10**6)
    distiller.fit(rows, steps=3, progress=False)
    sums, average = 0.0, distiller._stepper.processes.average

    def timed(*args: Any, **options: Any) -> Any:
        nonlocal sums
        begin = time.process_time()
        stop = average(*args, **options)
        sums += time.process_time() - begin
        return stop

    distiller._stepper.processes.average = timed  # type: ignore[method-assign]
    begin = time.process_time()
    for _ in range(steps):
        distiller.step(rows)
    return (time.process_time() - begin) / steps, sums / steps


def seconds_of_ddp(name: str, steps: int) -> tuple[float, float]:
    """Processor time of a step of a bare loop, whose module is wrapped where there are several processes."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    make, targets, rows = PROGRAMS[name]
    student, teacher = make()
    group = Group()
    module: Any = SurrogateKD(targets, teacher_forcing=0.0)(student.model, freeze(teacher.model))
    module(rows)
    pyro.set_rng_seed(group.rank)
    optim = _adam([param for param in module.parameters() if param.requires_grad])
    if group.size > 1:
        module = DistributedDataParallel(module, find_unused_parameters=True)
    begin = 0.0
    for number in range(steps + 3):
        if number == 3:
            begin = time.process_time()
        optim.zero_grad()
        loss = module(rows)
        loss.backward()
        optim.step()
        loss.item()
    return (time.process_time() - begin) / steps, 0.0


def _adam(params: list[torch.Tensor]) -> torch.optim.Adam:
    return torch.optim.Adam(params, lr=1e-4)


def measure(name: str, steps: int, rounds: int) -> str:
    """A line of the table."""
    sums, times = list[float](), dict[tuple[bool, int], list[float]]()
    for _ in range(rounds):
        for is_ddp, size in ((False, 1), (True, 1), (False, 2), (True, 2)):
            found = in_processes(seconds_of_ddp if is_ddp else seconds_of_steps, name, steps, size=size, timeout=600.0)
            if any(each is None or isinstance(each, Failure) for each in found):
                raise RuntimeError(f"{name} in {size} processes: {found}")
            times.setdefault((is_ddp, size), []).append(1e3 * statistics.mean(step for step, _ in found))
            if size == 2 and not is_ddp:
                sums.append(1e3 * statistics.mean(each for _, each in found))
    ratios, others = ([two / one for one, two in zip(times[k, 1], times[k, 2], strict=True)] for k in (False, True))
    return f"{name:18s} " + " ".join(map(_spread, (times[False, 1], times[False, 2], ratios, sums, others)))


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.3g} [{min(values):.3g}, {max(values):.3g}]".rjust(26)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--applications", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    titles = ("1 process, ms", "2 processes, ms", "ratio", "sums, ms", "DDP, ratio")
    print(" " * 18 + "".join(title.rjust(27) for title in titles))
    for name in options.applications:
        print(measure(name, options.steps, options.rounds), flush=True)


if __name__ == "__main__":
    main()
