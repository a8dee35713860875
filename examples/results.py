"""Put the results of experiments into docs/ and README.md: tables come from the runs' JSON, prose is by hand.

    python -m examples.results results/helmholtz results/vrnn    # add these runs, then write all tables
    python -m examples.results                                   # write all tables from docs/results

Adding a run copies its results.json to docs/results/NAME.json, and its pictures of the first seed to docs/results/NAME-*.png. In the
page, what stands between ``<!-- table NAME TABLE -->`` and ``<!-- end -->`` is replaced by that table and its note, and what stands
after ``<!-- run NAME -->`` by the command, the seeds, the time and the machine. Successive tables of one run that have the same note
show it once, under the first. After ``<!-- headline -->`` comes the table of :mod:`examples._headline`. The same marks work in
docs/objectives.md, in the pages of docs/how_to, and in README.md.
"""

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from examples._headline import headline
from examples._pictures import MAX_PICTURE_BYTES

PAGE = Path("docs/results.md")

_BLOCK = re.compile(r"(<!-- (table|run|headline)(?: ([\w.-]+))?(?: ([^>]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def take(run: Path, folder: Path) -> list[Path]:
    """Copy the figures and pictures of a run into the documentation; returns the files written.

    Raises:
        SystemExit: the run has no results yet, or a picture is too large.
    """
    source = run / "results.json"
    if not source.exists():
        raise SystemExit(f"{source} does not exist: finish the run with python -m examples.{run.name} --reuse")
    results = json.loads(source.read_text(encoding="utf-8"))
    for settings in (results["settings"], results["changes"]):
        for name in ("data", "data_root"):
            if settings.get(name):
                settings[name] = PurePath(settings[name]).name  # the folder is of no interest on other machines
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{run.name}.json"]
    written[0].write_text(json.dumps(results, indent=1), encoding="utf-8")
    first = min(found["seed"] for found in results["runs"])
    for picture in sorted(run.glob("*.png")):
        seed = re.search(r"-(\d+)$", picture.stem)
        if seed and int(seed[1]) != first:
            continue
        if picture.stat().st_size > MAX_PICTURE_BYTES:
            raise SystemExit(
                f"{picture} has {picture.stat().st_size} bytes, more than the {MAX_PICTURE_BYTES} that docs/ takes"
            )
        name = picture.stem.removesuffix(f"-{first}")
        written.append(folder / f"{run.name}-{name}.png")
        shutil.copyfile(picture, written[-1])
    return written


def pages_with_tables(page: Path) -> list[Path]:
    """The page of results, and the other pages that may show its tables; those that exist."""
    others = page.with_name("objectives.md"), page.parents[1] / "README.md"
    return [path for path in (page, *others, *sorted(page.parent.glob("how_to/*.md"))) if path.exists()]


def fill(page: str, results: dict[str, Any]) -> str:
    """The page, with every table and every run written from the results, which are given by name.

    Raises:
        SystemExit: the page names a run or a table that does not exist.
    """
    shown = ("", "")  # the last run and its note

    def block(match: re.Match[str]) -> str:
        nonlocal shown
        head, kind, name, table, end = match.groups()
        if kind == "headline":
            return f"{head}{markdown(headline(results))}\n{end}"
        if name not in results:
            raise SystemExit(f"{PAGE} asks for the run {name!r}, but the runs are {', '.join(results)}")
        if kind == "table" and table not in results[name]["tables"]:
            raise SystemExit(f"the run {name!r} has no table {table!r}; it has {', '.join(results[name]['tables'])}")
        if kind == "run":
            return f"{head}{provenance(results[name])}\n{end}"
        found = results[name]["tables"][table]
        note = found.get("note", "")
        below = f"\n\n{note}" if note and shown != (name, note) else ""
        shown = name, note
        return f"{head}{markdown(found['cells'])}{below}\n{end}"

    return _BLOCK.sub(block, page)


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


def provenance(results: dict[str, Any]) -> str:
    """The command, the seeds, the time and the machine of a run."""
    words = list(results.get("command", []))  # of a run that is no experiment of examples/
    words = words or ["python", "-m", f"examples.{results['experiment']}", "--preset", results["preset"]]
    for name, value in results["changes"].items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    runs, machine = results["runs"], results["machine"]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    minutes = [run["seconds"] / 60 for run in runs]
    took = f"{min(minutes):.1f} to {max(minutes):.1f}" if len(minutes) > 1 else f"{minutes[0]:.1f}"
    device = machine["gpu"] if results["settings"]["device"] != "cpu" else f"{machine['threads']} CPU thread(s)"
    return (
        f"`{shlex.join(words)}`, seeds {seeds}; {took} minutes per seed on {device}, {machine['processor']}, "
        f"Python {machine['python']}, torch {machine['torch']}."
    )


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Add runs and write the page; returns the files written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs to add")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    folder = options.page.with_suffix("")
    written = [path for run in options.runs for path in take(run, folder)]
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    pages = pages_with_tables(options.page)
    for page in pages:
        page.write_text(fill(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    print("\n".join(f"written: {path}" for path in [*written, *pages]))
    return [*written, *pages]


if __name__ == "__main__":
    main()
