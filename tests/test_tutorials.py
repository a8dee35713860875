"""The tutorials: each has the form of a notebook, and its cells run in order, in a process of its own.

The site runs them by myst-nb (`make docs`). Here the cells are taken out by a regular expression, so that the tests
need no package of the site.
"""

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.support.package_files import ROOT

FOLDER = ROOT / "docs" / "tutorials"
TUTORIALS = [
    "first_model",
    "compress_vae",
    "discrete_latents",
    "sequences",
    "deep_chains",
    "continual",
    "posterior",
    "ship_it",
]
CHECKOUT = {"models", "examples", "tests"}  # not installed with the package

every_tutorial = pytest.mark.parametrize("name", TUTORIALS)


def text_of(name):
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def cells(text):
    """The code of each cell, without its options."""
    found = re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", text, re.M | re.S)
    assert len(found) == text.count("{code-cell}") > 3
    return [re.sub(r"\A(:.*\n)+", "", code) for code in found]


def modules_of(tree):
    """The first names of all modules that a tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


@every_tutorial
def test_a_tutorial_is_a_notebook_with_a_question_and_printed_results(name):
    text = text_of(name)
    header, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.S).groups()
    assert "file_format: mystnb" in header
    assert "name: python3" in header
    title, question = body.strip().split("\n\n")[:2]
    assert title.startswith("# ")
    assert question.startswith("*Question: ")
    tree = ast.parse("\n".join(cells(text)))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert "print(" in text
    assert "plt.show()" in text
    assert "set_rng_seed(" in text or "manual_seed(" in text


@every_tutorial
def test_a_tutorial_imports_nothing_that_only_a_checkout_has(name):
    assert not set(modules_of(ast.parse("\n".join(cells(text_of(name)))))) & CHECKOUT


@every_tutorial
def test_a_tutorial_says_what_can_go_wrong_and_ends_with_exercises_and_links(name):
    headings = re.findall(r"^## (.*)$", text_of(name), re.M)
    assert headings[-3:] == ["What can go wrong", "Exercises", "Where to read on"]
    assert "](" in text_of(name).split("## Where to read on")[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@every_tutorial
def test_the_cells_of_a_tutorial_run_in_order(name, tmp_path):
    if name == "ship_it":
        for package in ("onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="the extra `export` is not installed")
    script = tmp_path / f"{name}.py"
    script.write_text("\n".join(cells(text_of(name))), encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    options = ["-W", "error::UserWarning", "-W", "ignore:FigureCanvasAgg is non-interactive"]
    done = subprocess.run(
        [sys.executable, *options, str(script)],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_tutorial_is_tested():
    assert {path.stem for path in FOLDER.glob("*.md")} - {"index"} == set(TUTORIALS)
