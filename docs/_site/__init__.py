"""What the site needs beside Sphinx's own extensions; each file here is one thing."""

from typing import Any

from sphinx.application import Sphinx

from _site import drawings, in_browser, links, references, scripts


def setup(app: Sphinx) -> dict[str, Any]:
    """Register all of it with Sphinx."""
    app.connect("builder-inited", scripts.fetch)
    app.connect("builder-inited", in_browser.make, priority=600)  # after the scripts
    app.connect("source-read", links.rewrite)
    app.connect("missing-reference", references.resolve)
    app.connect("autodoc-process-docstring", links.link_pages)
    app.connect("autodoc-skip-member", _skip)
    app.connect("html-page-context", drawings.add_script)
    app.connect("html-page-context", in_browser.add_script)
    app.add_directive("mermaid", drawings.Mermaid)
    app.add_directive("in-browser", in_browser.InBrowser)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _skip(app: Sphinx, what: str, name: str, member: Any, is_skipped: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which the docstring of the class describes."""
    return True if type(member).__name__ == "_tuplegetter" else None
