"""Tables of the runs: what each variant's student ends at, and when it is as good as the loop's at its end."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples._tables import Estimates, Table, cell, over_seeds
from examples.results import fill, take
from tests.benchmarks.time_to_quality.curves import final_quality, time_to
from tests.benchmarks.time_to_quality.pictures import draw
from tests.benchmarks.time_to_quality.runs import found_in, write
from tests.benchmarks.time_to_quality.variants import CAPTURES, LOOP, Variant

__all__ = ["NAME", "ratios", "report", "reuse_table", "table", "to_page"]

NAME = "time_to_quality"
Run = dict[str, Any]


def ratios(runs: Sequence[Run], loops: Mapping[int, Run], measure: str, clock: str) -> list[float | None]:
    """For each run, the time at which it is as good as its seed's loop at its end, over the loop's whole time; None for never.

    Args:
        runs: of one variant, one a seed.
        loops: of each seed.
        measure: its name.
        clock: ``cpu``, ``wall`` or ``steps``, on which no other program has an effect.
    """
    found: list[float | None] = []
    for run in runs:
        loop = loops[run["seed"]]
        reached = time_to(run[clock], run["values"][measure], final_quality(loop["values"][measure]))
        found.append(None if reached is None else reached / loop[clock][-1])
    return found


def seconds_of_a_step(run: Run) -> float:
    """Processor time, over the second half of the steps, in which nothing is compiled any more."""
    half = next(i for i, step in enumerate(run["steps"]) if step >= run["steps"][-1] / 2)
    half = min(half, len(run["steps"]) - 2)
    return (run["cpu"][-1] - run["cpu"][half]) / (run["steps"][-1] - run["steps"][half])


def by_variant(runs: Sequence[Run]) -> dict[Variant, list[Run]]:
    """The runs of each variant in the order of seeds: loops first, then by objective, share, capture and reuse."""
    found: dict[Variant, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        found.setdefault(Variant(**run["variant"]), []).append(run)
    order = sorted(
        found,
        key=lambda v: (
            v.who != "loop",
            v.objective == "paper",
            v.objective,
            ("own", "teacher", "fitted").index(v.start),
            -v.share,
            list(CAPTURES).index(v.capture),
            v.reuse,
        ),
    )
    return {variant: found[variant] for variant in order}


def table(runs: Sequence[Run]) -> Table:
    """The table of a model."""
    variants, measures = by_variant(runs), runs[0]["measures"]
    loops = {run["seed"]: run for run in variants[LOOP]}
    first = next(iter(measures))
    rows: dict[str, Estimates] = {}
    for variant, mine in variants.items():
        paired = [run for run in mine if run["seed"] in loops]
        rows[variant.name] = [
            *(over_seeds([final_quality(run["values"][name]) for run in paired]) for name in measures),
            over_seeds([1000 * seconds_of_a_step(run) for run in paired]),
            _mean(ratios(paired, loops, first, "cpu")),
            _mean(ratios(paired, loops, first, "wall")),
            _mean(ratios(paired, loops, first, "steps")),
            *(_mean(ratios(paired, loops, name, "cpu")) for name in list(measures)[1:]),
        ]
    columns = [
        *measures.values(),
        "ms a step",
        f"time to the loop's {measures[first]}",
        "the same, wall time",
        "the same, steps",
        *(f"time to the loop's {measures[name]}" for name in list(measures)[1:]),
    ]
    loop = variants[LOOP][0]
    whole = over_seeds([run["cpu"][-1] for run in variants[LOOP]])
    note = (
        f"{loop['sizes']}; the loop has {loop['steps'][-1]} steps and takes {whole.mean:.1f} s of the processor. Times are shares of the "
        "loop's whole time, processor time unless it says wall time or steps; in brackets the number of seeds in which the quality is reached, where "
        "it is not all of them."
    )
    return Table(f"{loop['model']}: {loop['sizes']}", columns, rows, note)


def reuse_table(runs: Mapping[str, Sequence[Run]]) -> Table:
    """Time to quality and the bound on fresh noise, for each model and reuse: eager, over all steps, by the advised objective."""
    rows: dict[str, Estimates] = {}
    every = sorted({run["variant"]["reuse"] for found in runs.values() for run in found})
    for model, found in runs.items():
        variants = by_variant(found)
        loops = {run["seed"]: run for run in variants[LOOP]}
        objective = next((v.objective for v in variants if v.who == "library" and v.reuse > 1), "")
        chosen = {v.reuse: r for v, r in variants.items() if v == Variant("library", objective, reuse=v.reuse)}
        if len(chosen) < 2:
            continue
        first = next(iter(found[0]["measures"]))
        paired = {m: [run for run in chosen.get(m, []) if run["seed"] in loops] for m in every}
        title = f"{model}, {objective}"
        rows[f"{title}: time"] = [_mean(ratios(paired[m], loops, first, "cpu")) for m in every]
        rows[f"{title}: {found[0]['measures']['bound']}"] = [
            over_seeds([final_quality(run["values"]["bound"]) for run in paired[m]] or [math.nan]) for m in every
        ]
        rows[f"{title}: ms a step"] = [
            over_seeds([1000 * seconds_of_a_step(run) for run in paired[m]] or [math.nan]) for m in every
        ]
    note = (
        "m: the number of steps that each draw of the teacher serves. Eager steps; times are shares of the loop's, as above."
    )
    return Table("Reuse of teacher draws", [f"m = {m}" for m in every], rows, note)


def _mean(values: Sequence[float | None]) -> Any:
    """The mean over the seeds in which it is reached, as a cell: an estimate where these are all, or words."""
    reached = [value for value in values if value is not None]
    if not values:
        return "-"
    if not reached:
        return "never"
    return (
        over_seeds(reached)
        if len(reached) == len(values)
        else f"{cell(over_seeds(reached))} ({len(reached)} of {len(values)})"
    )


def report(out: Path, command: Sequence[str]) -> dict[str, Any]:
    """Write ``results.json`` and the pictures of all runs of a folder, in the form of the examples' results.

    Args:
        out: folder of the runs.
        command: the words of the command that made them.
    """
    runs = {
        model: found for model, found in found_in(out).items() if any(Variant(**run["variant"]) == LOOP for run in found)
    }
    tables = {model: table(found) for model, found in runs.items()}
    if runs:
        tables["reuse"] = reuse_table(runs)
    for model, found in runs.items():
        draw(by_variant(found), out / f"{model}.png")
    everything = [run for found in runs.values() for run in found]
    seeds = sorted({run["seed"] for run in everything})
    results = {
        "experiment": NAME,
        "command": list(command),
        "settings": {"device": everything[0]["settings"]["device"] if everything else "cpu"},
        "changes": {},
        "tables": {name: {"title": made.title, "cells": made.cells, "note": made.note} for name, made in tables.items()},
        "runs": [{"seed": s, "seconds": sum(run["wall"][-1] for run in everything if run["seed"] == s)} for s in seeds],
        "machine": everything[0]["machine"] if everything else {},
    }
    write(out / "results.json", results)
    return results


def to_page(out: Path, page: Path) -> list[Path]:
    """Copy tables and pictures into the folder of a page, and write its tables.

    Returns:
        The files written.
    """
    folder = page.with_suffix("")
    written = take(out, folder)
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    page.write_text(fill(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    return [*written, page]
