"""The frame of every experiment: presets and options, cached teachers, finished seeds, results.json.

An experiment is an :class:`Experiment`: presets of its settings, a function that runs one seed, and a function that makes tables of
the runs. ``run`` gives it a command line. Every field of the settings is an option: ``--steps 100`` changes the preset's steps.

A finished seed is kept in ``--out`` as ``seed-K.json``, and a run with different settings may not overwrite it. With ``--reuse``, a
seed that was finished with the same settings is not run again, so that seeds can run side by side and be put together at the end. A
change of the code is not noticed. A teacher is kept in ``--cache`` under a name made from all that it depends on. After Ctrl-C
neither is kept.
"""

import argparse
import hashlib
import json
import os
import platform
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

import pyro_kd
from examples._tables import Run, Table, text_table

TOO_SHORT = (
    "The smoke preset only shows that the program runs. It is too short to learn: its numbers and pictures mean nothing."
)


@dataclass(frozen=True)
class Settings:
    """What every experiment's run depends on; experiments add fields, and set the defaults to the values of the ``cpu`` preset.

    Attributes:
        device: where models are trained.
        compile: whether training steps are compiled (docs/performance.md).
        learning_rate: of Adam.
        weight_decay: of Adam.
        cosine: whether the learning rate falls to 0 along half a cosine.
    """

    device: str = "cpu"
    compile: bool = False
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    cosine: bool = True


@dataclass(frozen=True)
class DataSettings(Settings):
    """The settings of experiments whose data can be chosen.

    Attributes:
        data: name of the data set, as in :mod:`pyro_kd.datasets`.
        data_root: folder or file of the data set, if it is not embedded.
    """

    data: str = ""
    data_root: str = ""


@dataclass
class Place:
    """The folders that a run writes to.

    Attributes:
        out: folder of the results.
        cache: folder of the trained teachers.
        saved_seconds: training time that the cache has saved so far.
    """

    out: Path
    cache: Path
    saved_seconds: float = 0.0

    def trained(self, module: nn.Module, depends_on: Mapping[str, Any], train: Callable[[], Any]) -> float:
        """Train a module with ``train()``, or load the weights that an earlier run kept.

        Args:
            module: trained in place; its ``repr`` and ``depends_on`` name the file.
            depends_on: all that the weights depend on: settings, seed, a :func:`fingerprint` of the data.
            train: trains the module in place.

        Returns:
            The seconds that the training took, now or in the earlier run.
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
        tables: ``f(runs)`` returns tables by name.
        draw: ``f(runs, out)`` draws pictures of all seeds together.
        may_be_zero: the whole numbers among the settings that may be 0, for none; all others are at least 1.
    """

    name: str
    description: str
    presets: Mapping[str, Any]
    run_seed: Callable[[int, Any, Place], Run]
    tables: Callable[[list[Run]], Mapping[str, Table]]
    draw: Callable[[list[Run], Path], Any] = lambda runs, out: None
    may_be_zero: Sequence[str] = ()


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
        "tables": {name: {"title": table.title, "cells": table.cells, "note": table.note} for name, table in tables.items()},
        "runs": [found["run"] for found in runs],
        "machine": runs[0]["machine"],
        "wall_seconds": time.perf_counter() - begin,
    }
    _write(options.out / "results.json", results)
    print(f"\nMean ± standard error over {len(runs)} seed{'s' * (len(runs) > 1)}, preset {options.preset}.")
    for table in tables.values():
        print(f"\n{table.title}\n\n" + "\n".join(text_table(table.cells)))
    for note in dict.fromkeys(table.note for table in tables.values() if table.note):
        print("\n" + textwrap.fill(note, 120))
    minutes = sum(found["run"]["seconds"] for found in runs) / len(runs) / 60
    print(f"\n{minutes:.1f} minutes per seed. Written: {options.out}")
    if options.preset == "smoke":
        print(f"\n{TOO_SHORT}")
    return results


def fingerprint(*tensors: Tensor) -> str:
    """A short name for the contents of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """The hardware and versions that measured times depend on."""
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
    """The options, and the settings: those of the preset, changed by the options."""
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{experiment.name}",
        description=experiment.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=list(experiment.presets), default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 3, or 1 with --preset smoke)")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder of the results (default: results/{experiment.name}, followed by the preset unless it is cpu)",
    )
    parser.add_argument("--cache", type=Path, default=Path("results/teachers"), help="folder of trained teachers")
    parser.add_argument("--reuse", action="store_true", help="do not run seeds again that --out has with the same settings")
    group = parser.add_argument_group("settings", "each replaces the preset's value")
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
    for name, value in {"seed": options.seed, "seeds": options.seeds, **changes}.items():
        least = 0 if name in ("seed", *experiment.may_be_zero) else 1
        for number in value if isinstance(value, tuple) else [value]:
            if type(number) is int and number < least:
                parser.error(f"argument --{name.replace('_', '-')}: must be at least {least}, not {number}")
    return options, replace(experiment.presets[options.preset], **changes)


def _changes(preset: Any, settings: Any) -> dict[str, Any]:
    """The settings that differ from the preset's."""
    return {name: value for name, value in asdict(settings).items() if getattr(preset, name) != value}


def _finished(path: Path, settings: Any) -> Run | None:
    """What is kept of a finished seed; None if there is nothing."""
    if not path.exists():
        return None
    found: Run = json.loads(path.read_text(encoding="utf-8"))
    mine = json.loads(json.dumps(asdict(settings)))
    if found["settings"] != mine:
        other = ", ".join(name for name in {**mine, **found["settings"]} if mine.get(name) != found["settings"].get(name))
        raise SystemExit(
            f"{path} is from a run with a different {other}: choose a different folder (--out FOLDER), or delete it"
        )
    return found


def _write(path: Path, value: Any) -> None:
    """Write JSON in one step, so that no reader sees half a file."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(value, indent=1), encoding="utf-8")
    unfinished.replace(path)
