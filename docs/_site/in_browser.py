"""The exported digit generator in the reader's browser: its files are made when the site is built, and a page has the place for it.

The files are those that the tutorial "Ship it" writes: its cells are run once more, in build/in_browser, since notebooks are run in
folders that are gone afterwards. Where a part is missing, the page shows the text that it has in the place.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from _site import scripts

TUTORIAL = Path(__file__).parents[1] / "tutorials" / "ship_it.md"
FOLDER = scripts.FOLDER.parent / "in_browser"
FILES = ("teacher.onnx", "student.onnx")
EXTRA = ("onnxruntime", "onnxscript")
FOR_TEST = 'np.savez("pyro.npz", **{f"{who}, {site}": found[site] for who, found in pictures.items() for site in found})'


def make(app: Sphinx) -> None:
    """Make the files, unless they are there for this text of the tutorial, and put them among the site's static files."""
    reason = missing()
    if reason:
        print(f"note: the exported student will not run in the page of the tutorial, for lack of {reason}", file=sys.stderr)
        return
    program = _program(TUTORIAL.read_text(encoding="utf-8"))
    key = FOLDER / hashlib.sha256(program.encode()).hexdigest()
    if not key.exists():
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir(parents=True)
        environment = os.environ | {"MPLBACKEND": "Agg"}
        subprocess.run([sys.executable, "-c", program], cwd=FOLDER, env=environment, check=True, stdout=subprocess.DEVNULL)
        key.touch()
    copied = Path(app.outdir) / "_static" / "in_browser"
    copied.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(FOLDER / name, copied / name)


def missing() -> str:
    """What the page lacks, or nothing."""
    lacks = [name for name in scripts.SCRIPTS if name.startswith("ort") and not (scripts.FOLDER / name).exists()]
    lacks += [f"the package {name}" for name in EXTRA if find_spec(name) is None]
    return ", ".join(lacks)


def _program(text: str) -> str:
    """The cells of the tutorial as one program, which also writes what Pyro gave."""
    return "\n".join([*re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", text, re.M | re.S), FOR_TEST])


class InBrowser(Directive):
    """The place for the script, or else the text of the directive."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Make the element."""
        if not missing():
            return [nodes.raw("", '<div class="in-browser"></div>', format="html")]
        note = nodes.note()
        self.state.nested_parse(self.content, self.content_offset, note)
        return [note]


def add_script(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Load the scripts on the page that has the place."""
    if doctree is not None and any("in-browser" in node.astext() for node in doctree.findall(nodes.raw)):
        app.add_js_file("npm/ort.wasm.min.js")
        app.add_js_file("in_browser.js", loading_method="defer")
