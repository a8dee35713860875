"""A training step of each application on a GPU: which of PyTorch's means for it pays, and how much.

    python -m tests.benchmarks.gpu
    python -m tests.benchmarks.gpu --all                # a session of 9 minutes, with the hierarchical VAE
    python -m tests.benchmarks.gpu --applications vrnn --rows 32 --length 628 --seconds 60 --json gpu.json
    python -m tests.benchmarks.gpu --all --device cpu --smoke      # a trial of the script in a minute; says nothing of a GPU

A step is loss, backward, fused Adam and zero_grad. Its variants, beside those of ``tests/benchmarks/step_time.py``:

- ``as it is``: captured, the graph run operation by operation (``compile(backend=None)``);
- ``cudagraphs``: the same operations, recorded as one CUDA graph (``compile(backend="cudagraphs")``);
- ``compiled``: captured and compiled by inductor (``compile()``);
- ``reduce-overhead``: compiled, its kernels recorded as one CUDA graph (``compile(mode="reduce-overhead")``);
- ``bfloat16``, ``bfloat16 by hand``: under autocast; the rest of ``bfloat16`` is as in ``compiled``;
- ``channels_last``: ``bfloat16`` with networks and images in that memory format.

The VRNN is unrolled, and too long for inductor: it has the first two of them only. Convolutional networks have the last three.

All variants are measured in one process, in alternating blocks of steps; printed are the median step time of the blocks and its
quartiles, and those of the ratio to the block by hand of the same round (``by hand`` is eager and in float32; matrix products
and convolutions in TF32 as torch is set, which is printed). ``peak`` is what tensors hold during a step beyond the level before it;
memory that CUDA graphs keep for themselves is not in it, but in ``reserved``: how much more the process holds of the device after the
variant's first steps than before it was built, networks and Adam's state included. ``first`` is the first step. ``syncs`` is the number of
times that a step waits for the device, as far as torch notices them (``torch.cuda.set_sync_debug_mode``).
"""

import argparse
import gc
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from tests.benchmarks.applications import APPLICATIONS, Application
from tests.benchmarks.gpu_session import hold_session
from tests.benchmarks.step_time import (
    REDUCED,
    Step,
    Timing,
    alternate,
    machine,
    peak_bytes,
    run_for,
    spread,
    synchronise,
    warm,
)

__all__ = ["VARIANTS", "Variant", "measure", "synchronisations"]

ROWS = {"helmholtz": 272, "hierarchical_vae": 128, "continual": 256, "vrnn": 32, "chain": 256}
"""Rows of a batch where ``--rows`` does not say: the paper's."""

ORDER = ("helmholtz", "chain", "hierarchical_vae", "continual", "vrnn")
"""From the shortest graph to the longest: a VRNN of 100 points takes half a minute to trace."""

CONVOLUTIONAL = ("hierarchical_vae", "continual")
COMPILED = ("helmholtz", *CONVOLUTIONAL)


@dataclass(frozen=True)
class Variant:
    """One way to take a step.

    Attributes:
        loss: of an application.
        applications: that have it.
        needs_cuda: whether it is left out elsewhere.
        bfloat16: whether the loss runs under autocast.
        channels_last: whether the networks are in that memory format.
    """

    loss: Callable[[Application], Callable[[], Tensor]]
    applications: tuple[str, ...] = tuple(APPLICATIONS)
    needs_cuda: bool = False
    bfloat16: bool = False
    channels_last: bool = False


def captured(**options: Any) -> Callable[[Application], Callable[[], Tensor]]:
    """The captured loss with these options of ``compile()``."""
    return lambda application: application.captured(**options)


VARIANTS: dict[str, Variant] = {
    "by hand": Variant(lambda application: application.by_hand),
    "library": Variant(lambda application: application.library),
    "as it is": Variant(captured(backend=None)),
    "cudagraphs": Variant(captured(backend="cudagraphs"), needs_cuda=True),
    "compiled": Variant(captured(backend="inductor"), COMPILED),
    "reduce-overhead": Variant(captured(mode="reduce-overhead"), COMPILED, needs_cuda=True),
    "bfloat16 by hand": Variant(lambda application: application.by_hand, CONVOLUTIONAL, bfloat16=True),
    "bfloat16": Variant(captured(backend="inductor"), CONVOLUTIONAL, bfloat16=True),
    "channels_last": Variant(captured(backend="inductor"), CONVOLUTIONAL, bfloat16=True, channels_last=True),
}


@dataclass
class Row(Timing):
    """What was measured of one variant.

    Attributes:
        reserved: bytes that the process holds of the device on its account.
        syncs: synchronisations a step, None where there is no CUDA.
        error: why there are no figures.
    """

    reserved: int = 0
    syncs: int | None = None
    error: str = ""


def step_of(application: Application, variant: Variant, device: str) -> Step:
    """A training step."""
    params = list(application.student.parameters())
    optim = torch.optim.Adam(params, lr=application.learning_rate, weight_decay=application.weight_decay, fused=True)
    loss, kind = variant.loss(application), torch.device(device).type

    def step() -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=variant.bfloat16):
            value = loss()
        value.backward()
        optim.step()
        optim.zero_grad()

    return step


def measure(
    name: str,
    sizes: Mapping[str, Any],
    device: str,
    *,
    seconds: float = 20.0,
    blocks: int = 25,
    variants: Mapping[str, Variant] = VARIANTS,
    deadline: float = math.inf,
    say: Callable[[str], None] = print,
) -> tuple[str, list[Row]]:
    """Measure the variants of an application, in alternating blocks: its sizes in words, and the rows.

    A variant that fails keeps its row, with the error; so does one that is not built by the deadline, a ``time.perf_counter()``.
    """
    rows, steps, expected, words = list[Row](), dict[str, Step](), dict[str, float](), ""
    is_cuda = torch.device(device).type == "cuda"
    for label, variant in variants.items():
        if name not in variant.applications:
            continue
        if variant.needs_cuda and not is_cuda:
            say(f"{name}: {label} is left out: it needs CUDA")
            continue
        rows.append(row := Row(label))
        if time.perf_counter() > deadline:
            row.error = "left out: the time of the session was over"
            continue
        before = held(device)
        try:
            words, steps[label], expected[label] = prepare(name, sizes, device, variant, row)
        except Exception as error:  # of memory, or of a compiler: the other variants go on
            row.error = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
            say(f"{name}: {label} failed: {row.error}")
        row.reserved = held(device) - before
    alternate(steps, expected, rows, seconds, blocks, device)
    return words, rows


def prepare(name: str, sizes: Mapping[str, Any], device: str, variant: Variant, row: Row) -> tuple[str, Step, float]:
    """Build a variant and take its first steps: the application's sizes, the step, and its seconds."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    format = {"memory_format": torch.channels_last} if variant.channels_last else {}
    application = APPLICATIONS[name](**sizes, **format, device=device)
    step = step_of(application, variant, device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        row.first = run_for(step, 1, device)
    without = [str(warning.message) for warning in caught if "continues without a graph" in str(warning.message)]
    if without:
        raise RuntimeError(without[0])
    seconds = warm(step, device)
    row.peak = peak_bytes(step, device)
    row.syncs = synchronisations(step, device)
    return application.sizes, step, seconds


def held(device: str) -> int:
    """Bytes that the process holds of a CUDA device, without what is free."""
    if torch.device(device).type != "cuda":
        return 0
    gc.collect()
    synchronise(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def synchronisations(step: Step, device: str) -> int | None:
    """How often a step waits for a CUDA device."""
    if torch.device(device).type != "cuda":
        return None
    synchronise(device)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    synchronise(device)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def report(words: str, rows: list[Row]) -> str:
    """The table of an application."""
    titles = ("ms per step", "/ by hand", "peak MiB", "reserved", "first s", "syncs")
    lines = [words, " " * 16 + "{:>25s} {:>22s} {:>9s} {:>9s} {:>8s} {:>6s}".format(*titles)]
    for row in rows:
        if row.error:
            lines.append(f"{row.variant:16s} {row.error}")
            continue
        ms, ratio = spread([1e3 * x for x in row.seconds], 2), spread(row.ratios, 3)
        syncs = "" if row.syncs is None else str(row.syncs)
        memory = f"{row.peak / 2**20:9.4g} {row.reserved / 2**20:9.4g}"
        lines.append(f"{row.variant:16s}{ms:>25s} {ratio:>22s} {memory} {row.first:8.2f} {syncs:>6s}")
    return "\n".join(lines)


def precision() -> str:
    """How torch computes products in float32."""
    return f"TF32: products {torch.backends.cuda.matmul.allow_tf32}, convolutions {torch.backends.cudnn.allow_tf32}"


def measure_all(options: argparse.Namespace, seconds: float, deadline: float = math.inf) -> tuple[dict[str, Any], str]:
    """Measure the applications that the options name, each for so many seconds: a dictionary for JSON, and the tables.

    Those of :data:`ORDER` that come last are measured last. Each application has an equal share of the time that is left until the
    deadline; what is not built by then is left out.
    """
    is_cuda = torch.device(options.device).type == "cuda"
    texts, found = [f"{machine(options.device)}; {precision()}"], {}
    print(texts[0])
    variants = {label: VARIANTS[label] for label in VARIANTS if label in options.variants}
    for index, name in enumerate(sorted(options.applications, key=ORDER.index)):
        now = time.perf_counter()
        until = now + (deadline - now) / (len(options.applications) - index)
        sizes = {"rows": options.rows or (ROWS if is_cuda else REDUCED)[name]}
        if name == "vrnn":
            sizes["length"] = options.length or (100 if options.all else 628)
        words, rows = measure(name, sizes, options.device, seconds=seconds, variants=variants, deadline=until)
        texts.append(report(f"{name}: {words}", rows))
        print("\n" + texts[-1], flush=True)
        found[name] = {"sizes": words, "variants": [asdict(row) for row in rows]}
    return {"machine": machine(options.device), "precision": precision(), "applications": found}, "\n\n".join(texts)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--applications", nargs="+", choices=APPLICATIONS, default=list(APPLICATIONS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=20.0, help="of each application, after the first steps")
    parser.add_argument("--rows", type=int, help=f"of a batch; without it {ROWS}, on a CPU {REDUCED}")
    parser.add_argument("--length", type=int, help="points of the VRNN's drawings: 628, with --all 100")
    parser.add_argument("--json", type=Path, help="file to write")
    group = parser.add_argument_group("a whole session")
    group.add_argument("--all", action="store_true", help="all of it: step times, then the hierarchical VAE's paper preset")
    group.add_argument("--minutes", type=float, default=9.0, help="the length of the session")
    group.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of what it writes")
    group.add_argument("--data", default="digits", help="of the hierarchical VAE; the paper's is cifar10")
    group.add_argument("--data-root", default="", help="folder of these data")
    group.add_argument("--smoke", action="store_true", help="tiny sizes, to try out the script in a minute")
    options = parser.parse_args(argv)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured (--device cpu --smoke tries out the script)")
        return
    if options.smoke:
        options.rows, options.length, options.minutes = 2, 4, 0.0
    if options.all:
        hold_session(
            # Most of the first part is for compilers, the rest for the blocks.
            lambda seconds: measure_all(
                options,
                max(0.3 * seconds / len(options.applications), 0.1),
                time.perf_counter() + 0.7 * seconds if seconds else math.inf,
            ),
            options.out,
            options.device,
            minutes=options.minutes,
            data=options.data,
            data_root=options.data_root,
            is_smoke=options.smoke,
        )
        return
    found, _ = measure_all(options, 0.1 if options.smoke else options.seconds)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
