"""Writes docs/random_programs.md from the report of `make test-slow`: on how many random programs each law has held.

python -m tests.random_programs_report results/slow.xml
"""

import re
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from tests.support.package_files import ROOT
from tests.support.program_laws.table import LAWS

PAGE = ROOT / "docs" / "random_programs.md"
HEAD = """# Laws on random programs

`make test-slow` tests every law of [tests/support/program_laws](../tests/support/program_laws) on new random programs, and writes this
page when a complete run has passed. `FUZZ_SHARE=0.2 make test-slow` takes a fifth of the programs, in some minutes. The docstring of
each check states its law. Programs to which a law does not apply are not counted.

"""


def counts(report: Path) -> Counter[str]:
    """The number of programs on which each law has held, from pytest's report in JUnit's form."""
    found: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        name = re.fullmatch(r"test_law_on_new_random_programs\[(.*)-\d+\]", case.get("name", ""))
        for entry in case.iter("property"):
            if name and entry.get("name") == "programs":
                found[name.group(1)] += int(entry.get("value", ""))
    return found


def page(found: Counter[str]) -> str:
    """The page, for a run of all laws."""
    missing = [name for name in LAWS if not found[name]]
    if missing:
        raise SystemExit(f"the run is not complete: no program of {', '.join(missing)}")
    lines = [
        f"In the last complete run {found.total():,} programs passed, and none failed:",
        "",
        "| law | programs |",
        "|---|---|",
    ]
    lines += [f"| {name} | {found[name]:,} |" for name in LAWS]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(counts(Path(sys.argv[1]))), encoding="utf-8")
