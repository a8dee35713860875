"""Drawings that a page has as the text of a flow chart, in a fence named mermaid: the code host draws them, and so does the site."""

from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from _site.scripts import FOLDER


class Mermaid(Directive):
    """The text of the drawing as an element that the script finds; without the script, the reader sees the text."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Make the element."""
        node = nodes.literal_block("\n".join(self.content), "\n".join(self.content), classes=["mermaid"], language="text")
        return [nodes.container("", node, classes=["drawing"])]


def add_script(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Load the script on pages that have a drawing."""
    drawn = doctree is not None and any("drawing" in node["classes"] for node in doctree.findall(nodes.container))
    if drawn and (FOLDER / "mermaid.js").exists():
        app.add_js_file("npm/mermaid.js")
        app.add_js_file("drawings.js", loading_method="defer")
