"""Everything that one GPU is asked for, in one session of a given length: ``python -m tests.benchmarks.gpu --all``.

First the step times of every application (:mod:`tests.benchmarks.gpu`), then the ``paper`` preset of the hierarchical VAE, with as many
steps as fit into what is left. Written to the folder, after each part, so that a session that is cut off leaves what it has:

- ``steps.json``, ``steps.txt``: the table of docs/performance.md;
- ``hierarchical_vae/results.json``: what ``python -m examples.results FOLDER/hierarchical_vae`` makes the tables of docs/results.md from;
- ``session.json``: the machine, and the seconds of each part.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.hierarchical_vae import PRESETS
from examples.hierarchical_vae import main as hierarchical_vae

__all__ = ["hold_session"]

STEPS_SHARE = 0.4
"""The part of a session for step times, first steps included: compilers take most of it."""
MODELS = 4
"""How many models the hierarchical VAE trains here: teacher, from the data, local, surrogate."""
TRAINING_SHARE = 0.7
"""Of the rest, the part that trains; the other measures the models."""


def hold_session(
    measure_steps: Callable[[float], tuple[dict[str, Any], str]],
    out: Path,
    device: str,
    *,
    minutes: float,
    data: str,
    data_root: str,
    is_smoke: bool,
    say: Callable[[str], None] = print,
) -> None:
    """Measure, train and write.

    Args:
        measure_steps: of the seconds for it, makes a dictionary for JSON and a text.
        out: the folder.
        device: for torch.
        minutes: the length of the session.
        data: name of the data set of the hierarchical VAE, and where it lies.
        data_root: its folder, if it is not part of the package.
        is_smoke: whether the sizes are those of the ``smoke`` preset, to try out the script.
        say: prints a line.
    """
    out.mkdir(parents=True, exist_ok=True)
    begin, seconds = time.perf_counter(), dict[str, float]()
    found, text = measure_steps(60 * minutes * STEPS_SHARE)
    (out / "steps.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (out / "steps.txt").write_text(text + "\n", encoding="utf-8")
    seconds["step times"] = time.perf_counter() - begin
    left = max(60 * minutes - seconds["step times"], 0)
    steps = steps_that_fit(found, left)
    say(f"{left:.0f} seconds are left: the hierarchical VAE trains each model for {steps} steps")
    preset = PRESETS["smoke" if is_smoke else "paper"]
    arguments = ["--preset", "smoke" if is_smoke else "paper", "--device", device, "--data", data, "--seeds", "1"]
    arguments += ["--steps", str(steps), "--teacher-steps", str(steps), "--samples", str(min(preset.samples, 2000))]
    arguments += ["--recipes", *[name for name in preset.recipes if name.endswith("mean W2², 0.1")][:2]]
    arguments += ["--out", str(out / "hierarchical_vae"), "--cache", str(out / "teachers")]
    hierarchical_vae(arguments + (["--data-root", data_root] if data_root else []))
    seconds["hierarchical VAE"] = time.perf_counter() - begin - seconds["step times"]
    session = {"machine": found["machine"], "minutes": minutes, "seconds": seconds, "steps": steps, "data": data}
    (out / "session.json").write_text(json.dumps(session, indent=1), encoding="utf-8")
    say(f"{sum(seconds.values()):.0f} seconds; written to {out}")


def steps_that_fit(found: dict[str, Any], seconds: float) -> int:
    """The steps of each model, from the eager step of the hierarchical VAE: at least 4, at most the paper's."""
    rows = found["applications"].get("hierarchical_vae", {}).get("variants", [])
    times = [row["seconds"] for row in rows if row["variant"] == "library" and row["seconds"]]
    if not times:
        return 4
    each = sorted(times[0])[len(times[0]) // 2]
    return max(4, min(PRESETS["paper"].steps, int(seconds * TRAINING_SHARE / MODELS / each)))
