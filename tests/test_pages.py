"""The pages of docs/how_to and docs/concepts: each runs as a reader would run it, prints what it shows, and leads somewhere."""

from pathlib import Path

import pytest

from tests.support import readme

DOCS = Path(__file__).parents[1] / "docs"
HOW_TO = sorted(path for path in (DOCS / "how_to").glob("*.md") if path.name != "index.md")
CONCEPTS = sorted(path for path in (DOCS / "concepts").glob("*.md") if path.name != "index.md")


@pytest.mark.usefixtures("one_thread")  # the last digit of a sum depends on their number
@pytest.mark.parametrize("page", [*HOW_TO, *CONCEPTS], ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_a_page_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert len(readme.blocks(text)) == text.count("```python")
    assert sum(block.output is not None for block in readme.blocks(text)) == text.count("```text")
    readme.run(text, name=page.name)


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_a_how_to_has_code_and_shows_what_it_prints(page):
    text = page.read_text(encoding="utf-8")
    assert "```python" in text
    assert "```text" in text


@pytest.mark.parametrize("page", [*HOW_TO, *CONCEPTS], ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_the_links_of_a_page_lead_somewhere(page):
    assert not readme.dead_links(page)
