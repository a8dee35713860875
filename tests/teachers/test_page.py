"""docs/teachers.md: every example prints what the page shows below it."""

import re

import pytest

from tests.support import readme
from tests.support.package_files import ROOT

PAGE = (ROOT / "docs" / "teachers.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("one_thread")  # the last digit of a sum depends on their number
def test_the_examples_print_what_the_page_shows():
    assert sum(block.output is not None for block in readme.blocks(PAGE)) == PAGE.count("```text")
    readme.run(PAGE, name="teachers.py")


def test_the_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
