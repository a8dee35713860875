"""The documentation, without building the site: links lead somewhere, each page can be reached, and no public name is missing."""

import importlib
import importlib.util
import re

import pytest

import pyro_kd
from tests.support import readme
from tests.support.package_files import ROOT
from tests.support.pages import DOCS, anchors, broken, contents, links, pages

API = sorted((DOCS / "api").glob("*.md"))
ROOMS = [
    "capture",
    "datasets",
    "diagnosis",
    "divergences",
    "errors",
    "export",
    "losses",
    "metrics",
    "plots",
    "teachers",
    "training",
]


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    assert not list(broken(path))


def test_a_link_that_leads_nowhere_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.support.pages.ROOT", tmp_path)
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# A heading, with `code`\n\n## Twice\n\n## Twice\n", encoding="utf-8")
    good = "[a](other.md) [b](other.md#a-heading-with-code) [c](other.md#twice-1) [d](#here) [e](https://pyro.ai)\n"
    page.write_text(f"# Here\n\n{good}\n    [in code](nowhere.md)\n\n```python\nx[1](nowhere)\n```\n", encoding="utf-8")
    assert not list(broken(page))
    page.write_text("# Here\n\n[a](nowhere.md), [b](other.md#three), ![c](c.png) and [d](#there)\n", encoding="utf-8")
    assert [line.rpartition(" ")[2] for line in broken(page)] == ["nowhere.md", "other.md#three", "c.png", "#there"]


def test_each_page_of_the_site_is_in_one_table_of_contents():
    found, waiting = ["index"], ["index"]
    while waiting:
        page = waiting.pop()
        listed = contents(page, (DOCS / f"{page}.md").read_text(encoding="utf-8"))
        found += listed
        waiting += listed
    of_site = [str(path.relative_to(DOCS).with_suffix("")) for path in pages() if path.is_relative_to(DOCS)]
    assert sorted(found) == sorted(of_site)


def described():
    """(page, object) for each object that a page of the API describes."""
    for path in API:
        module = None
        for kind, name in re.findall(
            r"^\.\. (currentmodule|auto\w+|py:data):: (\S+)(?!.*\n   :no-members:)$", path.read_text("utf-8"), re.M
        ):
            if kind == "currentmodule":
                module = importlib.import_module(name)
            elif kind == "automodule":
                yield from ((path.stem, name, member) for member in importlib.import_module(name).__all__)
            else:
                yield path.stem, module.__name__, name


def test_each_public_name_is_on_one_page_of_the_api():
    """By the object: a name of ``pyro_kd`` is described in its room, if the room has it too."""
    found = [(module, name) for _, module, name in described()]
    assert len(found) == len(set(found))
    of_rooms = {(f"pyro_kd.{room}", name) for room in ROOMS for name in importlib.import_module(f"pyro_kd.{room}").__all__}
    assert of_rooms <= set(found)
    objects = [id(getattr(importlib.import_module(module), name)) for module, name in found]
    assert len(objects) == len(set(objects))
    modules = {id(getattr(pyro_kd, room)) for room in ROOMS if room in pyro_kd.__all__}
    missing = [name for name in pyro_kd.__all__ if id(getattr(pyro_kd, name)) not in {*objects, *modules}]
    assert not missing


def test_each_room_with_public_names_has_its_page():
    files = [path for path in (ROOT / "pyro_kd").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    modules = [importlib.import_module(f"pyro_kd.{path.stem}") for path in files if path.stem != "__init__"]
    assert {module.__name__ for module in modules if hasattr(module, "__all__")} == {f"pyro_kd.{room}" for room in ROOMS}
    assert {path.stem for path in API} == {*ROOMS, "index", "noise", "isolation"}


@pytest.mark.usefixtures("one_thread")  # the last digit of a sum depends on their number
def test_the_first_distillation_runs_and_prints_what_its_page_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "start" / "first_distillation.md").read_text(encoding="utf-8")
    assert len(readme.blocks(page)) == page.count("```python") == page.count("```text") + 1
    readme.run(page, name="example.py")
    assert (tmp_path / "student.pt").exists()


def links_of_the_site():
    specification = importlib.util.spec_from_file_location("links", DOCS / "_site" / "links.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("written", "page", "shown"),
    [
        ("[a](results.md#b)", "docs/recipes.md", "[a](results.md#b)"),
        ("[a](../CONTRIBUTING.md#set-up)", "docs/recipes.md", "[a](contributing.md#set-up)"),
        ("[a](../../CHANGELOG.md)", "docs/start/install.md", "[a](../changelog.md)"),
        ("[a](../README.md#the-method-in-one-screen)", "docs/recipes.md", "[a](index.md)"),
        ("the [tests](../tests/third_party/) of it", "docs/third_party.md", "the tests of it"),
        ("![a\nb](results/a.png)", "docs/index.md", "![a\nb](results/a.png)"),
        ("[a](https://pyro.ai) [b](#c)", "docs/index.md", "[a](https://pyro.ai) [b](#c)"),
    ],
)
def test_links_on_the_site_are_those_of_the_code_host(written, page, shown):
    assert links_of_the_site().for_site(written, page, page) == shown


def test_a_page_that_shows_a_file_has_its_links():
    text = "[a](docs/architecture.md) [b](CHANGELOG.md) [c](LICENSE)"
    shown = links_of_the_site().for_site(text, "CONTRIBUTING.md", "docs/contributing.md")
    assert shown == "[a](architecture.md) [b](changelog.md) c"


def test_a_page_of_one_line_is_the_file_that_it_names():
    for name in ("contributing", "changelog"):
        source = [(DOCS / f"{name}.md").read_text(encoding="utf-8")]
        assert re.fullmatch(rf".*\(\.\./{name.upper()}\.md\).*\n", source[0])
        links_of_the_site().rewrite(None, name, source)
        assert source[0].startswith(f"# {name.capitalize()}\n")


def test_figures_in_tables_stay_in_one_line():
    source = ["| a | 0.1 ± 0.2 | 3 ± 4 |\nIn a text: 0.1 ± 0.2.\n"]
    links_of_the_site().rewrite(None, "results", source)
    assert source == ["| a | 0.1\u00a0±\u00a00.2 | 3\u00a0±\u00a04 |\nIn a text: 0.1 ± 0.2.\n"]


def test_docstrings_name_pages_and_headings_that_exist():
    for path in (ROOT / "pyro_kd").rglob("*.py"):
        for page, anchor in re.findall(r"docs/(\w+\.md)(?:#([\w-]+))?", path.read_text(encoding="utf-8")):
            assert (DOCS / page).exists(), path
            assert not anchor or anchor in anchors((DOCS / page).read_text(encoding="utf-8")), path


def test_the_site_has_no_link_that_is_not_checked():
    assert links("[a](b.md) ![c](d.png) [e](<f.md>) `[g](h.md)`") == ["b.md", "d.png", "f.md"]
