"""Installs packages of third parties without their dependencies, distils their programs, and writes docs/third_party.md.

python -m tests.third_party            # minutes, and the network
python -m tests.third_party FOLDER     # keeps the packages in FOLDER, and finds them there again
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.package_files import ROOT
from tests.third_party.run import STEPS

PACKAGES = {"cellbender": "cellbender_programs", "pyroved": "pyroved_programs", "tyxe": "tyxe_programs"}
VERSIONS = {"cellbender": "0.4.0", "pyroved": "0.3.0", "tyxe": "0.0.2"}
PAGE = ROOT / "docs" / "third_party.md"
HEAD = f"""# Programs of third parties

Unchanged models and guides of packages from PyPI, installed without their dependencies other than Pyro. Written by
`python -m tests.third_party`; the programs are in [tests/third_party/](../tests/third_party/). In each row, a student with a different size or
initialisation than its teacher is trained for {STEPS} steps. "Equal" is the sum of the terms of the teacher against a copy of
itself, which must all be 0. If a program is refused, the row has the error.

| package | program | sites | equal | first loss | after {STEPS} steps |
|---|---|---|---|---|---|
"""


def main(folder: Path) -> None:
    """Run all packages, each in a process of its own."""
    rows = []
    for package, module in PACKAGES.items():
        place = folder / package
        if not place.exists():
            pinned = f"{package}=={VERSIONS[package]}"
            subprocess.run(
                [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, pinned], check=True
            )
        variables = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{place}"}
        command = [sys.executable, "-W", "ignore", "-m", "tests.third_party.run", module]
        done = subprocess.run(command, cwd=ROOT, env=variables, check=True, stdout=subprocess.PIPE, text=True)
        rows += [row(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
        print(*rows[-1:], sep="\n", flush=True)
    PAGE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    if "error" in result:
        return f"| {result['package']} | {result['program']} | {result['error']} | | | |"
    numbers = " | ".join(f"{result[name]:.4g}" for name in ("sites", "equal", "first", "last"))
    return f"| {result['package']} | {result['program']} | {numbers} |"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))
