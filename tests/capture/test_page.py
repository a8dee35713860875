"""docs/capture.md names every file of the folder, and no others."""

import re
from pathlib import Path

import pyro_kd.capture

FOLDER = Path(pyro_kd.capture.__file__).parent
PAGE = (Path(__file__).parents[2] / "docs" / "capture.md").read_text(encoding="utf-8")


def test_the_table_names_the_files_there_are():
    table = PAGE[PAGE.index("| file |") :]
    files = {path.name for path in FOLDER.rglob("*.py")} - {"__init__.py"}
    named = set(re.findall(r"`(\w+\.py)`", table))
    assert named == files
