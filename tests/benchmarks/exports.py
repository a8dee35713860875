"""The tables of docs/exported_programs.md: every model and every program of tests/programs, exported, or why not.

    python -m tests.benchmarks.exports > docs/exported_programs.md
    python -m tests.benchmarks.exports --only BinomialChain epidemic    # the rows of these alone

It needs the extra ``export``, and takes some minutes.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Collection, Iterable
from itertools import chain
from pathlib import Path

import torch

from pyro_kd.errors import ExportMismatchError, PyroKDError
from pyro_kd.export import export_sampler
from tests.support.exported_programs import Case, models, tutorial_programs

HEAD = """# Exported programs

Written by `python -m tests.benchmarks.exports > docs/exported_programs.md`. The programs are those of `models/`, with small sizes, and the
students of `tests/programs/`; `tests/support/exported_programs.py` has the arguments.

- **rows**: *open*: any number of rows; *fixed*: the sizes of the example, since no argument is the number of rows, or the program works
  row by row.
- **noise**: number of inputs of noise. **operations**: of the graph of torch.export.
- **.pt2**, **ONNX**: the largest difference of an output from the Pyro program on the same noise, for two numbers of rows, as PyTorch
  and ONNX Runtime run it. *above 1e-5*: the rounding of float32 is larger than what is allowed: Pyro's values differ from those in float64
  as much as ONNX Runtime's do. `save(path, tolerance=1e-3)` accepts it.
- **export**: seconds for the export with its verification, on one core. **start**: seconds until ONNX Runtime has loaded the file and
  given the first rows.
- **speed**: rows a second of ONNX Runtime on one thread, relative to the Pyro program, eager, on as many rows.

"""
TOP = "| program | rows | noise | operations | .pt2 | ONNX | export | start | speed |\n|---|---|---|---|---|---|---|---|---|"


def row(case: Case, folder: Path) -> str:
    """One row of a table."""
    started = time.process_time()
    note = ""
    try:
        try:
            exported = export_sampler(case.program, *case.args, **case.options)
        except PyroKDError as error:
            note = f" ({short(error)})"
            started = time.process_time()
            options = {key: value for key, value in case.options.items() if key != "rows"}
            exported = export_sampler(case.program, *case.args, **options, fixed=True)
    except PyroKDError as error:
        return f"| {case.name} | refused: {short(error)} | | | | | | | |"
    seconds, report = time.process_time() - started, exported.report
    rows = "open" if exported.description.has_rows else f"fixed{note}"
    first = f"| {case.name} | {rows} | {len(exported.description.noise)} | {report.operations} | {report.largest_difference:.1g} |"
    above = ""
    try:
        try:
            found = exported.save(folder / "program.onnx")
        except ExportMismatchError:
            found = exported.save(folder / "program.onnx", tolerance=1e-3)
            above = " (above 1e-5)"
    except PyroKDError as error:
        return f"{first} refused: {short(error)} | {seconds:.1f} | | |"
    speed = found.rows_per_second / report.pyro_rows_per_second
    return f"{first} {found.largest_difference:.1g}{above} | {seconds:.1f} | {found.start_seconds:.2f} | {speed:.1f} |"


def short(error: Exception) -> str:
    """The beginning of a message, in one line, without paths."""
    text = str(error).split("\n")[0].partition(" See docs/")[0].replace(str(Path.cwd()) + "/", "")
    text = " ".join(text.replace("|", "/").replace("*", "\\*").split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def table(cases: Iterable[Case], folder: Path) -> str:
    rows = []
    for case in cases:
        rows.append(row(case, folder))
        print(rows[-1], file=sys.stderr, flush=True)
    return "\n".join([TOP, *rows])


def page(folder: Path) -> str:
    return (
        HEAD
        + "## Models\n\n"
        + table(models(), folder)
        + "\n\n## Programs of Pyro's tutorials\n\n"
        + table(tutorial_programs(), folder)
    )


def some(names: Collection[str], folder: Path) -> str:
    """The rows of some programs."""
    return table((case for case in chain(models(), tutorial_programs(names)) if case.name in names), folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="print the rows of these programs")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(some(only, Path(name)) if only else page(Path(name)))
