"""docs/certificate.md: the example prints what the page shows below it."""

from pathlib import Path

import pytest

from tests.support import readme

PAGE = (Path(__file__).parents[1] / "docs" / "certificate.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("one_thread")  # the last digit of a sum depends on their number
def test_the_example_prints_what_the_page_shows():
    assert len(readme.blocks(PAGE)) == PAGE.count("```python") == PAGE.count("```text") == 1
    readme.run(PAGE, name="example.py")
