"""docs/troubleshooting.md: every example prints what the page shows below it."""

import re
from pathlib import Path

import pyro
import pytest

from pyro_kd import errors
from tests.support import readme

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("one_thread")  # the last digit of a sum depends on their number
def test_the_examples_print_what_the_page_shows():
    assert len(readme.blocks(PAGE)) == PAGE.count("```python") == PAGE.count("```text")
    assert all(block.output for block in readme.blocks(PAGE))
    readme.run(PAGE, name="example.py")


def test_an_output_that_differs_from_the_page_fails():
    changed = PAGE.replace("taken for 'z'", "given for 'z'")
    assert changed != PAGE
    pyro.clear_param_store()
    with pytest.raises(AssertionError, match="a block of example.py prints"):
        readme.run(changed, 2, name="example.py")


def test_the_errors_exist_and_the_links_lead_somewhere():
    names = re.findall(r"`(\w+Error)`", PAGE)
    assert names
    assert all(hasattr(errors, name) for name in names)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
