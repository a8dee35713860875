"""The runs of one model that are there as JSON, and those that are missing."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from examples._experiment import Place, machine
from tests.benchmarks.time_to_quality.isolation import alone
from tests.benchmarks.time_to_quality.problem import Problem
from tests.benchmarks.time_to_quality.problems import PROBLEMS
from tests.benchmarks.time_to_quality.training import compile_all, train
from tests.benchmarks.time_to_quality.variants import Variant

__all__ = ["Runs", "found_in", "objectives_of"]

Run = dict[str, Any]


class Runs:
    """Makes runs, each kept in a file of its own, so that a run which is there is not made again.

    Args:
        out: folder of the files.
        cache: folder of the teachers.
        preset: of the problems' settings.
        steps: of the loop; None for the preset's.
        device: of teacher and student.
        isolated: whether each run has a process of its own.
    """

    def __init__(
        self, out: Path, cache: Path, preset: str, steps: int | None = None, *, device: str = "cpu", isolated: bool = True
    ) -> None:
        self.out, self.cache, self.preset, self.steps, self.isolated = out, cache, preset, steps, isolated
        self.device = device

    def make(self, model: str, seeds: Sequence[int], variants: Sequence[Variant]) -> None:
        """Make the missing runs: the variants one after the other, for each second seed in turned order."""
        call = alone if self.isolated else (lambda function, *args, cache=None: function(*args))
        for seed in seeds:
            missing = [variant for variant in variants if not self._path(model, seed, variant).exists()]
            if missing:
                call(_prepare, model, seed, self._settings(model), self.cache)
            for variant in missing[:: -1 if seed % 2 else 1]:
                with tempfile.TemporaryDirectory() as folder:
                    if variant.capture == "cached":
                        call(_compile, model, seed, self._settings(model), self.cache, variant, cache=folder)
                    found = call(_run, model, seed, self._settings(model), self.cache, variant, cache=folder)
                write(self._path(model, seed, variant), found | {"preset": self.preset})
                print(
                    f"{model}, seed {seed}, {variant.name}: {found['wall'][-1]:.1f} s, {found['cpu'][-1]:.1f} s of the processor, "
                    + ", ".join(f"{name} {values[-1]:.4g}" for name, values in found["values"].items()),
                    flush=True,
                )

    def _path(self, model: str, seed: int, variant: Variant) -> Path:
        return self.out / f"{model}-{seed}-{variant.key}.json"

    def _settings(self, model: str) -> Any:
        settings = replace(PROBLEMS[model].PRESETS[self.preset], device=self.device)
        return settings if self.steps is None else replace(settings, steps=self.steps)


def found_in(out: Path) -> dict[str, list[Run]]:
    """All runs of a folder, by model."""
    runs: dict[str, list[Run]] = {}
    for path in sorted(out.glob("*-*-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        runs.setdefault(run["model"], []).append(run)
    return {model: runs[model] for model in PROBLEMS if model in runs}


def objectives_of(model: str) -> list[str]:
    """The names of the library's objectives, the advised one first."""
    names: list[str] = PROBLEMS[model].OBJECTIVES
    return names


def write(path: Path, value: Any) -> None:
    """Write JSON in one step, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(value), encoding="utf-8")
    unfinished.replace(path)


def _problem(model: str, seed: int, settings: Any, cache: Path) -> Problem:
    torch.set_num_threads(1)
    problem: Problem = PROBLEMS[model].build(seed, settings, Place(cache, cache))
    return problem


def _prepare(model: str, seed: int, settings: Any, cache: Path) -> None:
    """Train what is trained once."""
    _problem(model, seed, settings, cache)


def _compile(model: str, seed: int, settings: Any, cache: Path, variant: Variant) -> None:
    """Compile what a run will need."""
    compile_all(_problem(model, seed, settings, cache), variant)


def _run(model: str, seed: int, settings: Any, cache: Path, variant: Variant) -> Run:
    problem = _problem(model, seed, settings, cache)
    return {
        "model": model,
        "seed": seed,
        "variant": variant.to_json(),
        "sizes": problem.sizes,
        "measures": dict(problem.measures),
        "settings": asdict(settings),
        "machine": machine(),
        **train(problem, variant, seed),
    }
