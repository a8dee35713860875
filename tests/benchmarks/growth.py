"""How the time and the memory of an eager step grow with each of its sizes, as exponents, with a picture.

    python -m tests.benchmarks.growth
    python -m tests.benchmarks.growth --only rows width --seconds 5 --json growth.json --picture docs/pictures/growth.png

One size grows at a time, the others stay:

- ``sites``: pairs of a chain of small normal latents (:mod:`tests.benchmarks.scaling`), with 8 rows;
- ``plates``: plates in sequence with a latent each, 8 rows a plate;
- ``particles``, ``vectorised particles``: of a chain of 10 sites;
- ``K``: samples of :class:`~pyro_kd.MultiSampleKD` on such a chain, from its 1,024 rows;
- ``rows``: of such a chain;
- ``width``: of an MLP with two square layers between a latent of 16 dimensions and a target of 784, in teacher and student, with 64 rows;
- ``points``, ``points, checkpointed``: of a VRNN with 8 rows; in the second, the student's networks do not keep what they compute, and compute
  it anew in the backward pass (activation checkpointing, :mod:`torch.utils.checkpoint`).

A step is loss and backward. Its time is a median; its memory is the peak of tensors beyond the level before the step. An exponent is the
least-squares slope of the logarithm over that of the size, in all sizes and in the upper half of them: 1 is proportional.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from examples._pictures import save, subplots
from models.vrnn import VRNN
from pyro_kd import MultiSampleKD, freeze
from tests.benchmarks.scaling import Chain, exponent, timed
from tests.benchmarks.step_time import Step, machine, peak_bytes
from tests.support.losses import SurrogateKD

__all__ = ["GROWTHS", "Growth", "Line", "measure"]


@dataclass(frozen=True)
class Growth:
    """A size that grows.

    Attributes:
        make: the step for a size.
        sizes: to measure.
    """

    make: Callable[[int], Step]
    sizes: tuple[int, ...]


@dataclass
class Line:
    """What was measured of one growth.

    Attributes:
        name: of the size.
        sizes, seconds, bytes: one entry a size.
    """

    name: str
    sizes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    def exponents(self, values: Sequence[float]) -> tuple[float, float]:
        """Of all sizes, and of the upper half. There are two sizes at least."""
        half = min(len(self.sizes) // 2, len(self.sizes) - 2)
        return exponent(self.sizes, values), exponent(self.sizes[half:], values[half:])


def step_of(student: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Loss and backward."""

    def step() -> None:
        student.zero_grad()
        loss().backward()

    return step


def chain(links: int, rows: int, make: Callable[..., Any] = SurrogateKD, **options: Any) -> Step:
    """A step of a chain of small normal latents."""
    student, teacher = Chain(links, 0.8), freeze(Chain(links, 0.9).model)
    loss = make(["y"], **options)(student.model, teacher)
    return step_of(student, lambda: loss(rows))


class Plates(nn.Module):
    """Plates in sequence, each with a latent whose mean is that of the latents before it; the target is in the last."""

    def __init__(self, plates: int, slope: float) -> None:
        super().__init__()
        self.plates = plates
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self) -> None:
        z = torch.zeros(8)
        for i in range(self.plates):
            with pyro.plate(f"plate{i}", 8):
                z = pyro.sample(f"z{i}", dist.Normal(self.slope * z.mean(), 1.0))
        with pyro.plate("rows", 8):
            pyro.sample("y", dist.Normal(z, 1.0))


def plates(number: int) -> Step:
    """A step of plates in sequence."""
    student = Plates(number, 0.8)
    loss = SurrogateKD(["y"])(student, freeze(Plates(number, 0.9)))
    return step_of(student, loss)


class Decoder(nn.Module):
    """z of 16 dimensions, an MLP with two square layers, and 784 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(16, width), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 784))

    def forward(self, rows: int) -> None:
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(16), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1))


def decoder(width: int) -> Step:
    """A step of networks of this width."""
    student = Decoder(width)
    loss = SurrogateKD(["x"])(student, freeze(Decoder(width)))
    return step_of(student, lambda: loss(64))


def vrnn(length: int, *, checkpointed: bool = False) -> Step:
    """A step of a VRNN over so many points."""
    student, teacher = VRNN(128, 256), VRNN(128, 256).eval()
    if checkpointed:
        for name, net in student.generative.items():
            student.generative[name] = checkpoint_wrapper(net, preserve_rng_state=False)
    targets = [f"{kind}{t}" for t in range(1, length + 1) for kind in ("pen", "move")]
    loss = SurrogateKD(targets, latent_weight=1e-3)(student.model, freeze(teacher.model))
    return step_of(student.generative, lambda: loss(8, length))


POINTS = (10, 20, 40, 80, 160)

GROWTHS = {
    "sites": Growth(lambda size: chain(size - 1, 8), (10, 20, 50, 100, 200, 500, 1000, 2000)),
    "plates": Growth(plates, (2, 5, 10, 20, 50, 100, 200, 500)),
    "particles": Growth(lambda size: chain(9, 8, num_particles=size), (1, 2, 4, 8, 16, 32)),
    "vectorised particles": Growth(
        lambda size: chain(9, 8, num_particles=size, vectorize_particles=True, max_plate_nesting=1),
        (1, 4, 16, 64, 256, 1024, 4096),
    ),
    "K": Growth(lambda size: chain(9, 1024, MultiSampleKD, num_samples=size), (2, 8, 32, 128, 512, 1024)),
    "rows": Growth(lambda size: chain(9, size), (16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144)),
    "width": Growth(decoder, (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)),
    "points": Growth(vrnn, POINTS),
    "points, checkpointed": Growth(lambda size: vrnn(size, checkpointed=True), POINTS),
}


def measure(name: str, growth: Growth, seconds: float, say: Callable[[str], None] = print) -> Line:
    """Measure one growth, each size for so many seconds and at least three steps."""
    line = Line(name)
    for size in growth.sizes:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        step = growth.make(size)
        line.sizes.append(size)
        line.seconds.append(median(timed([step], seconds, "cpu")[0]))
        line.bytes.append(peak_bytes(step, "cpu"))
        say(f"{name:>22s} {size:8d} {1e3 * line.seconds[-1]:12.2f} ms {line.bytes[-1] / 2**20:10.3f} MiB")
    return line


def table(lines: Sequence[Line]) -> str:
    """The table of the page, in Markdown."""
    rows = [
        "| size | from, to | ms | exponent of time: all, upper half | peak MiB | exponent of memory: all, upper half |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        (time, late), (memory, late_memory) = line.exponents(line.seconds), line.exponents(line.bytes)
        ms, mib = [1e3 * value for value in line.seconds], [value / 2**20 for value in line.bytes]
        rows.append(
            f"| {line.name} | {line.sizes[0]:,}, {line.sizes[-1]:,} | {ms[0]:.3g}, {ms[-1]:,.3g} | {time:.2f}, {late:.2f} | "
            f"{mib[0]:.2g}, {mib[-1]:,.3g} | {memory:.2f}, {late_memory:.2f} |"
        )
    return "\n".join(rows)


def draw(lines: Sequence[Line], path: Path) -> None:
    """Time and memory over size, both relative to the smallest, in logarithms."""
    figure, panels = subplots(1, 2, figsize=(11, 4.5), sharex=True)
    for panel, what in zip(panels, ("seconds", "bytes"), strict=True):
        for line in lines:
            values = getattr(line, what)
            panel.loglog(
                [size / line.sizes[0] for size in line.sizes],
                [value / values[0] for value in values],
                marker=".",
                label=line.name,
            )
        largest = max(line.sizes[-1] / line.sizes[0] for line in lines)
        panel.loglog([1, largest], [1, largest], color="grey", linestyle=":", linewidth=1, label="proportional")
        panel.set_xlabel("size / smallest size")
        panel.set_ylabel(
            {"seconds": "time of a step", "bytes": "peak memory of a step"}[what] + " / that of the smallest size"
        )
        panel.set_ylim(bottom=0.7)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="small", frameon=False)
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROWTHS, default=list(GROWTHS), metavar="SIZE", help=", ".join(GROWTHS))
    parser.add_argument("--largest", type=int, help="leave larger sizes out")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each size")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--picture", type=Path, help="file to write")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(f"{machine('cpu')}, {options.threads} used\n")
    lines = []
    for name in options.only:
        growth = GROWTHS[name]
        sizes = tuple(size for size in growth.sizes if options.largest is None or size <= options.largest)
        if len(sizes) < 2:
            parser.error(f"fewer than two sizes of {name!r} are left: {growth.sizes}")
        lines.append(measure(name, Growth(growth.make, sizes), options.seconds))
    print("\n" + table(lines))
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1), encoding="utf-8")
    if options.picture:
        draw(lines, options.picture)


if __name__ == "__main__":
    main()
