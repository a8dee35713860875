"""docs/teacher_cache.md: every example prints what the page shows below it."""

import pytest

from tests.support import readme
from tests.support.package_files import ROOT

PAGE = (ROOT / "docs" / "teacher_cache.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("one_thread")
def test_the_examples_print_what_the_page_shows():
    assert sum(block.output is not None for block in readme.blocks(PAGE)) == PAGE.count("```text") == 2
    readme.run(PAGE, name="teacher_cache.py")
