"""The command line."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples._tables import text_table
from tests.benchmarks.time_to_quality import __doc__ as description
from tests.benchmarks.time_to_quality.problems import PROBLEMS
from tests.benchmarks.time_to_quality.report import report, to_page
from tests.benchmarks.time_to_quality.runs import Runs, objectives_of
from tests.benchmarks.time_to_quality.variants import CAPTURES, variants


def main(argv: Sequence[str] | None = None, *, isolated: bool = True) -> dict[str, Any]:
    """Make what is missing, write the report, print the tables."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = _parse(words)
    runs = Runs(options.out, options.cache, options.preset, options.steps, device=options.device, isolated=isolated)
    for model in options.models:
        names = objectives_of(model)
        chosen = names if options.objectives == "all" else names[:1]
        made = variants(chosen, options.shares, options.reuse, options.compile, options.starts)
        runs.make(model, range(options.seed, options.seed + options.seeds), made)
    results = report(options.out, ["python", "-m", "tests.benchmarks.time_to_quality", *shlex.split(options.command)])
    for table in results["tables"].values():
        print(f"\n{table['title']}\n\n" + "\n".join(text_table(table["cells"])) + f"\n\n{table['note']}")
    if options.page:
        print("\n".join(f"written: {path}" for path in to_page(options.out, options.page)))
    return results


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.time_to_quality",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", nargs="*", choices=PROBLEMS, default=[], help="which to run; without it, the report alone"
    )
    parser.add_argument(
        "--preset", default="cpu", help="smoke, cpu, or for the hierarchical VAE paper or paper-short: width 128 to 32"
    )
    parser.add_argument("--device", default="cpu", help="of teacher and student")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, help="of the loop, in place of the preset's")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0], help="of the loop's steps, for both ways")
    parser.add_argument("--reuse", type=int, nargs="+", default=[1, 8], help="steps that each draw of the teacher serves")
    parser.add_argument(
        "--compile",
        nargs="+",
        choices=CAPTURES,
        default=["off", "on"],
        help="graph: as it is; cached: by an earlier run; cudagraphs: on a GPU",
    )
    parser.add_argument(
        "--starts",
        nargs="+",
        choices=("own", "teacher", "fitted"),
        default=["own"],
        help="teacher: weights of some of its units; fitted: and layers fitted to its own",
    )
    parser.add_argument("--objectives", choices=["advised", "all"], default="advised", help="of the library")
    parser.add_argument("--out", type=Path, default=Path("results/time_to_quality"), help="folder of the runs")
    parser.add_argument("--cache", type=Path, default=Path("results/teachers"), help="folder of trained teachers")
    parser.add_argument("--page", type=Path, help="page into which tables and pictures are copied")
    parser.add_argument(
        "--command", default="", help="the options that made the runs, for the page: --command='--models chain'"
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
