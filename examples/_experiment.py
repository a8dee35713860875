"""What every experiment shares: presets and options, cached teachers, finished seeds, tables, results.json.

An experiment is an :class:`Experiment`: presets of its settings, a function that runs one seed, and one that makes tables of the
runs. ``run`` gives it a command line. Every field of the settings is an option, so ``--steps 100`` changes the preset's.

A seed that is done is kept in ``--out`` as ``seed-K.json``, and no run with other settings may write over it. With ``--reuse``, one
with the same settings is not done again, so that seeds can be run side by side and put together at the end; whether the code has
changed since is not looked at. A teacher is kept in ``--cache`` under a name made of what it depends on. Ctrl-C keeps neither.
"""

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

import pyro_kd
from pyro_kd.metrics import Estimate

Estimates = list[Estimate | str]
"""A row of a table."""
Run = dict[str, Any]
"""What is kept of one seed, as JSON: by default ``{"models": {name: {figure: number}}}``."""


MAX_PICTURE_BYTES = 300_000
"""Of a picture in the repository."""


@dataclass(frozen=True)
class Settings:
    """What every experiment's run depends on; experiments add their own fields, with the values of the ``cpu`` preset as defaults.

    Attributes:
        device: where models are trained.
        compile: whether by compiled graphs (docs/performance.md).
    """

    device: str = "cpu"
    compile: bool = False


@dataclass(frozen=True)
class DataSettings(Settings):
    """The settings of experiments that can be run on other data.

    Attributes:
        data: name of the data set, as in :mod:`pyro_kd.datasets`.
        data_root: folder or file of the data set, for those that are not embedded.
    """

    data: str = ""
    data_root: str = ""


@dataclass(frozen=True)
class Table:
    """Figures with a row a model and a column a measure; a cell is a text or an estimate over seeds."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Estimates]

    @property
    def cells(self) -> list[list[str]]:
        """The head and the rows as text."""
        return [["", *self.columns]] + [[name, *map(cell, row)] for name, row in self.rows.items()]


@dataclass
class Place:
    """Where a run writes.

    Attributes:
        out: folder of the results.
        cache: folder of the trained teachers.
        saved_seconds: training that the cache has saved so far.
    """

    out: Path
    cache: Path
    saved_seconds: float = 0.0

    def trained(self, module: nn.Module, depends_on: Mapping[str, Any], train: Callable[[], Any]) -> float:
        """Fill a module with the weights that ``train()`` gives it, or that an earlier run kept. Returns seconds of training.

        Args:
            module: trained in place; its ``repr`` and ``depends_on`` name the file.
            depends_on: all that the weights depend on: settings, seed, a :func:`fingerprint` of the data.
            train: trains the module in place.
        """
        key = json.dumps({"module": repr(module), **depends_on}, sort_keys=True, default=str)
        path = self.cache / f"{type(module).__name__}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
        if path.exists():
            kept = torch.load(path, weights_only=True, map_location="cpu")
            module.load_state_dict(kept["state"])
            print(f"trained before: {path}")
            self.saved_seconds += kept["seconds"]
            return float(kept["seconds"])
        begin = time.perf_counter()
        train()
        seconds = time.perf_counter() - begin
        self.cache.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save({"state": module.state_dict(), "seconds": seconds}, unfinished)
        unfinished.replace(path)
        return seconds


@dataclass(frozen=True)
class Experiment:
    """One question.

    Attributes:
        name: of the module in examples/, and of the folder of results.
        description: the module's docstring.
        presets: settings by name: ``smoke``, ``cpu`` and ``paper``.
        run_seed: ``f(seed, settings, place)`` trains, measures, draws this seed's pictures into ``place.out``, and returns a run.
        tables: ``f(runs)``: by name.
        draw: ``f(runs, out)``: pictures of all seeds together.
    """

    name: str
    description: str
    presets: Mapping[str, Any]
    run_seed: Callable[[int, Any, Place], Run]
    tables: Callable[[list[Run]], Mapping[str, Table]]
    draw: Callable[[list[Run], Path], Any] = lambda runs, out: None


def run(experiment: Experiment, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run an experiment from the command line; writes and returns results.json."""
    options, settings = _parse(experiment, argv)
    options.out.mkdir(parents=True, exist_ok=True)
    begin, runs = time.perf_counter(), []
    for seed in range(options.seed, options.seed + options.seeds):
        place = Place(options.out, options.cache)
        path = place.out / f"seed-{seed}.json"
        found = _finished(path, settings)
        found = found if options.reuse else None
        if found is None:
            started = time.perf_counter()
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            found = {"seed": seed, **experiment.run_seed(seed, settings, place)}
            seconds = time.perf_counter() - started + place.saved_seconds
            found = {
                "settings": asdict(settings),
                "run": json.loads(json.dumps(found)) | {"seconds": seconds},
                "machine": machine(),
            }
            _write(path, found)
        runs.append(found)
    tables = experiment.tables([found["run"] for found in runs])
    experiment.draw([found["run"] for found in runs], options.out)
    results = {
        "experiment": experiment.name,
        "preset": options.preset,
        "settings": asdict(settings),
        "changes": _changes(experiment.presets[options.preset], settings),
        "tables": {name: {"title": table.title, "cells": table.cells} for name, table in tables.items()},
        "runs": [found["run"] for found in runs],
        "machine": runs[0]["machine"],
        "wall_seconds": time.perf_counter() - begin,
    }
    _write(options.out / "results.json", results)
    print(f"\nMean ± standard error over {len(runs)} seed{'s' * (len(runs) > 1)}, preset {options.preset}.")
    for table in tables.values():
        print(f"\n{table.title}\n\n" + "\n".join(text_table(table.cells)))
    minutes = sum(found["run"]["seconds"] for found in runs) / len(runs) / 60
    print(f"\n{minutes:.1f} minutes a seed. Written: {options.out}")
    return results


def adam(learning_rate: float, weight_decay: float = 0.0) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Adam, as a trainer makes it of the parameters it finds."""
    return lambda params: torch.optim.Adam(params, lr=learning_rate, weight_decay=weight_decay)


def cosine(steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    """The learning rate from its start to 0 along half a cosine."""
    return lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)


def estimates(runs: Sequence[Run], figures: Sequence[str]) -> dict[str, Estimates]:
    """For each model of the runs, the mean and standard error over seeds of each figure; NaN where a run lacks it."""
    return {
        name: [over_seeds([run["models"].get(name, {}).get(figure, float("nan")) for run in runs]) for figure in figures]
        for name in runs[0]["models"]
    }


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean and standard error of one figure; NaN as the error of a single seed."""
    return Estimate.of(torch.tensor(values, dtype=torch.float64))


def cell(value: Estimate | str) -> str:
    """A figure as text, with as many digits as its standard error has two of."""
    if isinstance(value, str):
        return value
    mean, error = value.mean, value.standard_error
    if mean != mean:
        return "-"
    size = abs(mean) if error != error or error == 0 else error
    if abs(mean) >= 1e6:
        return f"{mean:.1e}" if error != error else f"{mean:.1e} ± {error:.1e}"
    digits = 3 if size == 0 else min(max(1 - int(torch.tensor(size).log10().floor()), 0), 6)
    return f"{mean:.{digits}f}" if error != error else f"{mean:.{digits}f} ± {error:.{digits}f}"


def fingerprint(*tensors: Tensor) -> str:
    """A short name for the contents of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, the first to the left; the first row is the head, underlined."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.rjust(width) if i else text.ljust(width) for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def machine() -> dict[str, Any]:
    """What a measurement of time depends on."""
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "pyro_kd": pyro_kd.__version__,
    }


def _parse(experiment: Experiment, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Any]:
    """The options, and the settings: a preset's, changed by the options that name its fields."""
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{experiment.name}",
        description=experiment.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=list(experiment.presets), default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, help="number of seeds: 3, and 1 with --preset smoke")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder of the results: results/{experiment.name}, followed by the preset where it is not cpu",
    )
    parser.add_argument("--cache", type=Path, default=Path("results/teachers"), help="folder of trained teachers")
    parser.add_argument("--reuse", action="store_true", help="take finished seeds with the same settings from --out")
    group = parser.add_argument_group("settings", "each changes the preset's value")
    first = next(iter(experiment.presets.values()))
    for field in fields(first):
        value = getattr(first, field.name)
        many = isinstance(value, tuple)
        kind = type(value[0]) if many else type(value)
        names = dict.fromkeys(("--" + field.name.replace("_", "-"), "--" + field.name))
        shown = ", ".join(f"{name}: {getattr(preset, field.name)!r}" for name, preset in experiment.presets.items())
        if kind is bool:
            group.add_argument(*names, action=argparse.BooleanOptionalAction, help=shown)
        else:
            group.add_argument(*names, type=kind, nargs="+" if many else None, help=shown.replace("%", "%%"))
    options = parser.parse_args(argv)
    if options.seeds is None:
        options.seeds = 1 if options.preset == "smoke" else 3
    if options.out is None:
        options.out = Path("results") / (experiment.name + f"_{options.preset}" * (options.preset != "cpu"))
    given = {field.name: getattr(options, field.name) for field in fields(first)}
    changes = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None
    }
    return options, replace(experiment.presets[options.preset], **changes)


def _changes(preset: Any, settings: Any) -> dict[str, Any]:
    """The settings that options have changed."""
    return {name: value for name, value in asdict(settings).items() if getattr(preset, name) != value}


def _finished(path: Path, settings: Any) -> Run | None:
    if not path.exists():
        return None
    found: Run = json.loads(path.read_text(encoding="utf-8"))
    mine = json.loads(json.dumps(asdict(settings)))
    if found["settings"] != mine:
        other = ", ".join(name for name in {**mine, **found["settings"]} if mine.get(name) != found["settings"].get(name))
        raise SystemExit(f"{path} is of a run with another {other}: choose another folder, --out FOLDER, or remove it")
    return found


def _write(path: Path, value: Any) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(value, indent=1), encoding="utf-8")
    unfinished.replace(path)
