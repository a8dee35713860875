"""Every example and every model has its own test file."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["examples", "models"])
def test_every_program_has_a_test_file(folder):
    programs = {path.stem for path in (ROOT / folder).glob("[!_]*.py")}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / folder).glob("test_*.py")}
    assert programs <= tests
