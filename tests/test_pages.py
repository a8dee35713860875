"""The pages of docs/how_to and docs/concepts run as a reader would run them, and print what they show."""

import importlib.util

import matplotlib as mpl
import pytest

from tests.support import readme
from tests.support.pages import DOCS

HOW_TO = sorted(path for path in (DOCS / "how_to").glob("*.md") if path.name != "index.md")
SLOW = ["bayesian_neural_network", "count_vae", "epidemic", "forecaster", "gaussian_process"]  # they train a teacher first
CONCEPTS = sorted(path for path in (DOCS / "concepts").glob("*.md") if path.name != "index.md")


PAGES = [
    pytest.param(page, id=f"{page.parent.name}/{page.stem}", marks=[pytest.mark.slow] if page.stem in SLOW else [])
    for page in [*HOW_TO, *CONCEPTS]
]


@pytest.mark.usefixtures("one_thread")  # the last digit of a sum depends on their number
@pytest.mark.parametrize("page", PAGES)
def test_a_page_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert len(readme.blocks(text)) == text.count("```python")
    assert sum(block.output is not None for block in readme.blocks(text)) == text.count("```text")
    readme.run(text, name=page.name)


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_a_how_to_has_code_and_shows_what_it_prints(page):
    assert any(block.output for block in readme.blocks(page.read_text(encoding="utf-8")))


def test_the_drawing_of_the_semi_auxiliary_form_is_that_of_its_script(tmp_path):
    script = DOCS / "concepts" / "draw_semi_auxiliary.py"
    specification = importlib.util.spec_from_file_location("drawing", script)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.draw(tmp_path / "drawn.svg")
    drawn = (tmp_path / "drawn.svg").read_text(encoding="utf-8")
    kept = script.with_name("semi_auxiliary.svg").read_text(encoding="utf-8")
    assert drawn.count("<path") == kept.count("<path")
    if f"Matplotlib v{mpl.__version__}," in kept:  # other versions may round differently
        assert drawn == kept
