"""Third parties' programs cost nothing against their own copies, and students of them learn; skipped where the package is not there."""

import importlib

import pytest

from tests.third_party.__main__ import HEAD, PACKAGES, PAGE
from tests.third_party.run import run


@pytest.mark.slow
@pytest.mark.parametrize("module", PACKAGES.values())
def test_programs_are_distilled_as_they_are(module):
    for case in importlib.import_module(f"tests.third_party.{module}").CASES:
        result = run(case)
        assert result.equal == 0.0, case
        assert result.last < 0.2 * result.first, case


def test_page_has_every_package():
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(HEAD)
    for package in PACKAGES:
        assert f"\n| {package} " in text
