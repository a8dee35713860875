"""docs/results.md: its tables are those of the runs' JSON, and adding a run copies everything."""

import json
import re
from pathlib import Path

import pytest

from examples import continual_toy, results

ROOT = Path(__file__).parents[2]


@pytest.fixture
def finished(tmp_path):
    """A run of two seeds with an option changed, as a user leaves it."""
    out = tmp_path / "runs" / "toy"
    continual_toy.main(["--preset", "smoke", "--seeds", "2", "--steps", "3", "--out", str(out)])
    return out


def test_a_run_is_added(finished, tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("Prose.\n<!-- table toy figures -->\n<!-- end -->\nMore.\n<!-- run toy -->\nold\n<!-- end -->\n")
    written = results.main([str(finished), "--page", str(page)])
    assert {path.name for path in written} == {"toy.json", "toy-forgetting.png", "page.md"}
    text = page.read_text()
    cells = json.loads((finished / "results.json").read_text())["tables"]["figures"]["cells"]
    for row in cells:
        assert "| " + " | ".join(row) + " |" in text
    assert "`python -m examples.continual_toy --preset smoke --steps 3`, seeds 0, 1; " in text
    assert text.count(continual_toy.NOTE) == 1
    assert text.startswith("Prose.\n")
    assert "\nMore.\n" in text
    assert "old" not in text.split("More.")[1]
    again = text
    results.main(["--page", str(page)])
    assert page.read_text() == again


def test_an_error_names_what_is_missing(finished, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- table toy nothing -->\n<!-- end -->")
    with pytest.raises(SystemExit, match="has no table 'nothing'; it has figures"):
        results.main([str(finished), "--page", str(page)])
    page.write_text("<!-- run other -->\n<!-- end -->")
    with pytest.raises(SystemExit, match="the run 'other'"):
        results.main(["--page", str(page)])
    with pytest.raises(SystemExit, match="finish the run"):
        results.main([str(tmp_path / "nothing"), "--page", str(page)])


def test_a_picture_that_is_too_large_is_refused(finished, tmp_path):
    (finished / "forgetting-0.png").write_bytes(b"0" * (results.MAX_PICTURE_BYTES + 1))
    with pytest.raises(SystemExit, match="more than the 300000"):
        results.take(finished, tmp_path / "docs")


def test_the_page_is_what_the_runs_say():
    page = ROOT / results.PAGE
    folder = page.with_suffix("")
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    assert found
    pages = results.pages_with_tables(page)
    assert {"results.md", "objectives.md", "README.md", "choose_lambda.md"} <= {path.name for path in pages}
    for other in pages:
        text = other.read_text(encoding="utf-8")
        assert results.fill(text, found) == text, f"python -m examples.results has not written {other.name}"
    text = page.read_text(encoding="utf-8")
    for name in found:
        assert f"<!-- run {name} -->" in text, f"docs/results/{name}.json is not in the page"


def test_the_pages_pictures_are_there_and_small():
    page = ROOT / results.PAGE
    pictures = {str(path.relative_to(page.parent)): path for path in page.with_suffix("").glob("*.png")}
    text = page.read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\((results/[^)]+\.png)\)", text))
    assert shown
    assert shown <= set(pictures)
    for name, path in pictures.items():
        assert f"]({name})" in text, f"{name} is not shown"
        assert path.stat().st_size <= results.MAX_PICTURE_BYTES
